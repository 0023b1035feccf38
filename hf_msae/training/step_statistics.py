"""What one step leaves for logs and counters: sums that stay on the device and travel between processes together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_msae.modeling.selection import ProcessGroup
from hf_msae.modeling.sparse_ops import index_active, sum_by_latent


class StepStatistics:
    """What logs and counters want of a step, in one tensor, so that it travels in one message.

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
