"""How much each latent of an SAE matters, and the same SAE with its latents in another order (arXiv:2505.00190)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.modeling.untrusted import PER_LATENT

IMPORTANCES = ("energy", "contribution", "frequency")


@dataclass(frozen=True)
class Importance:
    """How much each latent matters, (num_latents,) float64 each.

    Args:
        energy: E[a²].
        contribution: E[a²]·‖W_dec‖², the mean squared norm of what the latent adds.
        frequency: E[a > 0].
    """

    energy: Tensor
    contribution: Tensor
    frequency: Tensor

    def by(self, order: str) -> Tensor:
        """The one that an order is by.

        Args:
            order: of `IMPORTANCES`.

        Raises:
            InputError: there is no such order.
        """
        if order not in IMPORTANCES:
            raise InputError(f"Latents can be ordered by {', '.join(IMPORTANCES)}; got {order!r}.")
        return {"energy": self.energy, "contribution": self.contribution, "frequency": self.frequency}[order]


@torch.inference_mode()
def measure_importance(sae: MatryoshkaSAE, batches: Iterable[Tensor]) -> Importance:
    """Measure how much each latent matters.

    Args:
        sae: in evaluation mode.
        batches: activations, (n, hidden_size) each.

    Raises:
        InputError: there are no activations.
    """
    squares = torch.zeros(sae.config.num_latents, dtype=torch.float64, device=sae.device)
    fired, tokens = torch.zeros_like(squares), 0
    for x in batches:
        latents = sae.encode(x.to(sae.device))
        squares += latents.double().pow(2).sum(0)
        fired += (latents > 0).sum(0)
        tokens += len(x)
    if tokens == 0:
        raise InputError("Importance needs activations; got none.")
    energy = (squares / tokens).cpu()
    return Importance(energy, energy * sae.W_dec.double().pow(2).sum(1).cpu(), (fired / tokens).cpu())


def reorder(sae: MatryoshkaSAE, order: Tensor, prefix_sizes: Sequence[int] = ()) -> MatryoshkaSAE:
    """The same SAE with its latents in another order and other levels; the whole computes the same.

    What was measured at its old levels is left out of the configuration.

    Args:
        sae: the SAE.
        order: old numbers of the latents in the new order, (num_latents,) int64.
        prefix_sizes: the new levels; by default one.

    Raises:
        InputError: `order` is not a permutation of all latents, or the sizes do not fit.
    """
    num_latents = sae.config.num_latents
    if order.shape != (num_latents,) or not torch.equal(order.sort().values.cpu(), torch.arange(num_latents)):
        raise InputError(
            f"order must hold each of the {num_latents} latents once, got {tuple(order.shape)} with "
            f"{len(order.unique())} different ones."
        )
    values = sae.config.to_dict() | {"prefix_sizes": list(prefix_sizes) or [num_latents], "measured": None}
    values |= {"level_weights": "uniform", "balance": None}
    with torch.device("meta"):
        model = MatryoshkaSAE(MatryoshkaSAEConfig(**values))
    state = {
        name: (tensor[order.to(tensor.device)] if name in PER_LATENT else tensor.clone())
        for name, tensor in sae.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model.train(sae.training)
