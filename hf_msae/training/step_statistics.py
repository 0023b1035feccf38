"""What a step leaves for logs and counters, and what the log adds up of many: sums that stay on the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_msae.modeling.selection import ProcessGroup
from hf_msae.modeling.sparse_ops import index_active, sum_by_latent


class StepStatistics:
    """What logs and counters want of a step, in one tensor, so that it travels between processes in one message.

    That is how often each latent was active, how many losses were not finite, the loss and the auxiliary loss, the
    error of each level, where latents are to be sorted by it, each latent's sum of squared activations, and, before
    the penalty's p changes, the penalty with this p and with the next.
    """

    def __init__(
        self, num_latents: int, num_levels: int, device: torch.device, energies: bool = False, penalties: bool = False
    ) -> None:
        self.sizes = [num_latents, 1, 2, num_levels, num_latents if energies else 0, 2 if penalties else 0]
        self.sums = torch.zeros(sum(self.sizes), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, output: Any, weight: float, next_penalty: Tensor | None = None) -> None:
        """Take in a micro-batch's `MatryoshkaSAEOutput`; losses count by its weight in the mean."""
        counts, bad, losses, levels, energies, penalties = self.sums.split(self.sizes)
        if output.active is not None:
            # Whole numbers, whose order of summing changes nothing; `bincount` would wait for a GPU.
            ones = (output.active.values > 0).long()
            counts += torch.zeros_like(counts, dtype=torch.int64).index_add_(0, output.active.latents, ones)
        else:
            counts += (output.latents > 0).sum(0)
        if energies.numel() and output.active is not None:
            places = index_active(output.active, self.sizes[0])
            energies += sum_by_latent(output.active.values.double().square(), places.order, places.first)
        elif energies.numel():
            energies += output.latents.double().square().sum(0)
        bad += ~output.loss.isfinite()
        losses += weight * torch.stack([output.loss, output.aux_loss])
        if next_penalty is not None:
            penalties += weight * torch.stack([output.sparsity_loss, next_penalty])
        if output.level_losses.shape == levels.shape:  # not where other levels are drawn every step
            levels += weight * output.level_losses

    def reduce(self, ranks: ProcessGroup) -> Sequence[Tensor]:
        """The same of all processes together."""
        return ranks.sum(self.sums).split(self.sizes)


class LogSums:
    """What is added up between two lines of the log, so that the training loop never waits for the device.

    Args:
        num_levels: The SAE's.
        device: Where its numbers are.
    """

    def __init__(self, num_levels: int, device: torch.device) -> None:
        self.num_levels, self.device = num_levels, device
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        # Of the steps: loss, auxiliary loss and L0; each level's error; the divergence, and how many steps had one.
        sizes = (3, self.num_levels, 2)
        zeros = [torch.zeros(size, dtype=torch.float64, device=self.device) for size in sizes]
        self.sums, self.levels, self.divergence = zeros
        self.steps = 0

    def add(self, losses: Tensor, l0: Tensor, levels: Tensor) -> None:
        """Take in a step's loss and auxiliary loss (2,), its L0 and its levels' errors (G,), all float64."""
        self.sums += torch.cat([losses, l0[None]])
        self.levels += levels
        self.steps += 1

    def add_divergence(self, divergence: Tensor) -> None:
        """Take in a step's divergence in nats per token."""
        self.divergence += torch.stack([divergence, torch.ones_like(divergence)])

    def means(self, levels: bool) -> dict[str, Any]:
        """Means over the steps, as `Learner.read_log` says; `levels` says whether levels are the same in all steps."""
        steps = max(1, self.steps)
        values: dict[str, Any] = dict(zip(("loss", "aux_loss", "l0"), (self.sums / steps).tolist(), strict=True))
        if levels:
            values["level_losses"] = (self.levels / steps).tolist()
        divergence, counted = self.divergence.tolist()
        return values | ({"kl": divergence / counted} if counted else {})

    def state_dict(self, divergence: bool) -> dict[str, Any]:
        """What a checkpoint holds of it; the divergence only where it is asked for."""
        state = {"sums": self.sums, "levels": self.levels, "steps": self.steps}
        return state | ({"divergence": self.divergence} if divergence else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.sums, self.levels = state["sums"].to(self.device), state["levels"].to(self.device)
        self.steps = state["steps"]
        if "divergence" in state:
            self.divergence = state["divergence"].to(self.device)
