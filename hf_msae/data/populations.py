"""Whether two sets of activations are of one kind: what an SAE is measured on must be like what it was trained on.

The means of samples of one kind lie apart by chance alone, by about a thousandth of the variance where documents of a
kind are a few hundred; those of children's stories and of an encyclopedia by three hundredths (measured at a layer of
a small language model). So the distance of the means tells kinds apart, whatever the SAE makes of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Squared distance of two means, in units of the variance, from which they are said to differ; what chance adds falls
# with the number of tokens.
DISTANCE = 0.005
CHANCE_TOKENS = 5
# So many rows of each batch are looked at: batches are shuffled, and one run has thousands.
ROWS_OF_BATCH = 256


@dataclass
class Population:
    """Sums over activations, from which their mean and variance follow.

    Args:
        num_tokens: How many activations.
        total: Their sum, (hidden_size,) float64.
        squares: The sum of their squared norms, () float64.
    """

    num_tokens: int
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Population":
        """That of activations (n, hidden_size)."""
        doubles = x.double()
        return cls(len(x), doubles.sum(0), doubles.pow(2).sum())

    def __add__(self, other: "Population") -> "Population":
        return Population(self.num_tokens + other.num_tokens, self.total + other.total, self.squares + other.squares)

    def distance(self, other: "Population") -> float:
        """The squared distance of the means, in units of the other's variance."""
        mean, other_mean = self.total.cpu() / self.num_tokens, other.total.cpu() / other.num_tokens
        variance = other.squares.cpu() / other.num_tokens - other_mean.pow(2).sum()
        return ((mean - other_mean).pow(2).sum() / variance.clamp_min(torch.finfo(torch.float64).tiny)).item()

    def differs(self, other: "Population") -> float | None:
        """The distance, where it is more than chance makes it; else None."""
        found = self.distance(other)
        chance = CHANCE_TOKENS / max(1, min(self.num_tokens, other.num_tokens))
        return found if found > DISTANCE + chance else None


def describe_difference(distance: float, trained_on: str) -> str:
    """In words, for a warning. `trained_on`: what the training data is called."""
    return (
        f"What the SAE was measured on is of another kind than what it was trained on ({trained_on}): the means of "
        f"their activations are {distance:.3f} apart, in units of their variance, of which chance makes less than "
        f"{DISTANCE}. Give text of the same kind as eval_dataset, or mix the kinds: a stream that is sorted by kind "
        "is shuffled within blocks of 10,000 rows only, so shuffle such data beforehand, or download it "
        "(streaming=False)."
    )
