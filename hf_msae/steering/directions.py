"""Directions that need no SAE: the baselines that steering by a latent has to be better than.

`diff_mean` is the difference of mean activations with and without a concept, which needs labels and is hard to beat
(Wu et al., "AxBench", arXiv:2501.17148); `random_direction` is what any shift of that length does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_msae.steering.gates import SteeringError


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector (hidden_size,) at a site. Raises SteeringError for a vector without length."""

    site: str
    vector: Tensor

    def __post_init__(self) -> None:
        length = self.vector.norm()
        if self.vector.ndim != 1 or not torch.isfinite(length) or length == 0:
            raise SteeringError(
                f"a direction is one finite vector that is not zero, got shape {tuple(self.vector.shape)} and length "
                f"{length.item()}."
            )
        object.__setattr__(self, "vector", self.vector / length)


def diff_mean(site: str, positive: Tensor, negative: Tensor) -> Direction:
    """From the mean of the activations `negative` (n, hidden_size) to that of `positive` (m, hidden_size)."""
    if not len(positive) or not len(negative):
        raise SteeringError(
            f"DiffMean needs activations with and without the concept, got {len(positive)} and {len(negative)}."
        )
    return Direction(site, positive.float().mean(0) - negative.float().mean(0))


def random_direction(site: str, hidden_size: int, seed: int = 0) -> Direction:
    """A direction drawn uniformly from all, the same for the same seed."""
    return Direction(site, torch.randn(hidden_size, generator=torch.Generator().manual_seed(seed)))
