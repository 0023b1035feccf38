"""What a latent says: the tokens that its direction makes likelier, and its neighbours in the dictionary.

The direct effect is what reaches the output if the latent's decoder row stays in the residual stream unchanged up to
the final norm: W_U · J · d, where J is the derivative of the final norm. What is approximated: later layers, which
read the direction too, are left out; and J depends on the activation, so its mean over a few real activations behind
the last layer is taken. A cap on the logits behind the unembedding (Gemma 2) is left out; it keeps their order.

`later_layers.mean_jacobian` gives a derivative that goes through the later layers, and takes the place of J where it
is given.

J is found by running the model itself: its last layer's output is replaced by activations with tangents, and what
reaches the unembedding is read. So any architecture's norm is right without being known here, and half precision
loses nothing to differences of nearly equal numbers.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.errors import InputError
from hf_msae.process_wide import forward_mode
from hf_msae.sites import in_this_thread, replace, resolve_site

# Elements of the (latents, vocabulary) product that exist at once.
EFFECTS_AT_ONCE = 1 << 25
TANGENTS_AT_ONCE = 4096


class _Reached(Exception):
    """Raised at the unembedding, to leave the forward there."""


class LogitEffects:
    """Direct effects of directions on the logits, in nats per unit of the direction.

    They are relative to their mean over the vocabulary, because a shift of all logits changes nothing.

    Args:
        model: with an unembedding, in evaluation mode.
        directions: decoder rows, (num_latents, width), each as long as an activation of 1 makes it.
        references: activations behind the last layer, (n, width), at which the final norm is linearised.
        jacobian: of what reaches the unembedding, (width of a direction, width there); by default of the final norm.

    Raises:
        InputError: the model has no unembedding, or directions are of another width than the residual stream.
    """

    def __init__(
        self, model: PreTrainedModel, directions: Tensor, references: Tensor, jacobian: Tensor | None = None
    ) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise InputError(f"{type(model).__name__} has no unembedding, so its latents promote no tokens.")
        if jacobian is None and directions.shape[-1] != references.shape[-1]:
            raise InputError(
                f"Directions of width {directions.shape[-1]} are not in a residual stream of width "
                f"{references.shape[-1]}, so they have no direct effect on the output."
            )
        if jacobian is None:
            jacobian = final_norm_jacobian(model, head, references)
        self.unembedding = head.weight.detach()
        self.mapped = directions.detach().to(jacobian) @ jacobian
        # In float64, because a mean over hundreds of thousands of rows of half precision would drift.
        self.mean = self.unembedding.mean(0, dtype=torch.float64).to(jacobian)

    @property
    def num_latents(self) -> int:
        """The number of directions."""
        return len(self.mapped)

    def of_latents(self, latents: Tensor) -> Tensor:
        """Effects of some latents on every token.

        Args:
            latents: (n,) int64.

        Returns:
            (n, vocabulary) float32.
        """
        mapped = self.mapped[latents]
        return nn.functional.linear(mapped.to(self.unembedding.dtype), self.unembedding).float() - (
            mapped @ self.mean
        ).unsqueeze(-1)

    def on_token(self, token_id: int) -> Tensor:
        """Effects of every latent on one token.

        Args:
            token_id: of the token.

        Returns:
            (num_latents,) float32.
        """
        return self.mapped @ (self.unembedding[token_id].float() - self.mean)

    @torch.no_grad()
    def extremes(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tokens that each latent promotes and suppresses most, and the effects on them.

        Args:
            count: how many tokens.

        Returns:
            Promoted ids and effects, suppressed ids and effects, each (num_latents, count), strongest first, on the
            CPU.
        """
        vocabulary = len(self.unembedding)
        size, count = max(1, EFFECTS_AT_ONCE // vocabulary), min(count, vocabulary)
        parts = []
        for latents in torch.arange(self.num_latents, device=self.mapped.device).split(size):
            effects = self.of_latents(latents)
            high, low = effects.topk(count), effects.topk(count, largest=False)
            parts.append((high.indices.cpu(), high.values.cpu(), low.indices.cpu(), low.values.cpu()))
        promoted, up, suppressed, down = (torch.cat(column) for column in zip(*parts, strict=True))
        return promoted, up, suppressed, down


def final_norm_jacobian(model: PreTrainedModel, head: nn.Module, references: Tensor) -> Tensor:
    """The mean derivative of what reaches the unembedding with respect to the last layer's output.

    Args:
        model: in evaluation mode.
        head: its unembedding.
        references: some activations behind the last layer, (n, width).

    Returns:
        (width in, width out) float32.
    """
    width = references.shape[-1]
    basis = torch.eye(width, dtype=references.dtype, device=references.device)
    rows = []
    for tangents in basis.split(max(1, TANGENTS_AT_ONCE // len(references))):
        primal = references.repeat(len(tangents), 1).unsqueeze(1)
        moved = tangents.repeat_interleave(len(references), 0).unsqueeze(1)
        tangent = _push_forward(model, head, primal, moved)
        rows.append(tangent.float().view(len(tangents), len(references), -1).mean(1))
    return torch.cat(rows)


def _push_forward(model: PreTrainedModel, head: nn.Module, primal: Tensor, tangent: Tensor) -> Tensor:
    """The tangent at the unembedding's input, (n, 1, width), of the last layer's output with a given tangent.

    `primal` is that output, (n, 1, width).
    """
    reached: list[Tensor] = []
    is_ours = in_this_thread()

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        if is_ours():
            reached.append(args[0])
            raise _Reached

    last = resolve_site(model, "layers.-1")
    weight = next(model.get_input_embeddings().parameters())
    tokens = torch.zeros(len(primal), 1, dtype=torch.long, device=weight.device)
    handle = head.register_forward_pre_hook(keep)
    try:
        with torch.no_grad(), forward_mode():
            dual = forward_ad.make_dual(primal, tangent)
            with replace(model, {last: lambda _: dual}, is_ours), suppress(_Reached):
                model(input_ids=tokens, use_cache=False)
            found = forward_ad.unpack_dual(reached[0]).tangent
            return torch.zeros_like(reached[0]) if found is None else found
    finally:
        handle.remove()


@torch.no_grad()
def nearest_latents(directions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The latents whose decoder rows have the largest cosine with each latent's.

    Args:
        directions: decoder rows, (num_latents, width).
        count: how many.

    Returns:
        Numbers and cosines, (num_latents, n) int64 and float32, nearest first, without itself; n is `count`, or less
        in a tiny dictionary.
    """
    unit = nn.functional.normalize(directions.float(), dim=-1)
    count = min(count, len(unit) - 1)
    indices, cosines = [], []
    places = torch.arange(len(unit), device=unit.device)
    for rows in places.split(max(1, EFFECTS_AT_ONCE // len(unit))):
        similar = unit[rows] @ unit.T
        similar[torch.arange(len(rows), device=unit.device), rows] = -torch.inf
        values, found = similar.topk(count)
        indices.append(found.cpu())
        cosines.append(values.cpu())
    return torch.cat(indices), torch.cat(cosines)


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token as text, by itself.

    Args:
        tokenizer: of the language model.
        ids: of the tokens.
    """
    if not ids:  # which `batch_decode` takes for one text without tokens
        return []
    return tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
