"""SynthSAEBench's world (arXiv:2602.14687): thousands of features in superposition, most of them in a hierarchy.

Its full size, SynthSAEBench-16k, has 16,384 features in 768 dimensions. What makes it harder than the toys:

- Firing probabilities fall by Zipf's law, from 0.4 to 0.0005.
- The first features make 128 complete trees, numbered level by level. A child fires only where its parent fires, one
  sibling at a time (of several that would, one is drawn), and as strongly as its parent does: its strength is
  multiplied by the parent's over the parent's mean. What parents and siblings take is made up for beforehand, but in
  part only: leaves fire a third as often as Zipf's law says, and 34.5 features fire at once where it would be 59.
- Whether features fire is correlated: normal numbers with a covariance of low rank are compared with thresholds.
- Mean strengths fall from 5 to 4, and vary from sample to sample by a standard deviation of each feature's own.
- Directions are random, pushed apart by some steps of gradient descent, and there is a bias.

The world is drawn by our own generator, so that it equals that of `sae_lens.synthetic` in its law and not in its bits;
tests hold the two together.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_msae.errors import InputError
from hf_msae.research.toys.sampling import Samples

# Samples made at once, in numbers of one matrix of features.
NUMBERS_AT_ONCE = 1 << 24
# Least share of a feature's normal number that is its own.
MIN_OWN_SHARE = 0.01
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class SynthBenchSettings:
    """What the world is drawn from; the defaults are SynthSAEBench-16k.

    Args:
        num_features: features, those of the trees first.
        hidden_size: dimensions.
        num_trees: complete trees.
        branching: children of a feature that has any.
        depth: steps from a root to a leaf.
        probabilities: the largest and the smallest firing probability.
        exponent: of Zipf's law.
        correlation_rank: normal numbers that all features share.
        correlation_scale: standard deviation of each feature's share in each of them.
        magnitudes: mean strength of the first and of the last feature.
        spread: mean and standard deviation of the normal number whose absolute value is a feature's spread.
        bias: length of the bias.
        orthogonal_steps: steps by which directions are pushed apart.
        orthogonal_rate: learning rate of these.
        seed: of all that is drawn once.
    """

    num_features: int = 16_384
    hidden_size: int = 768
    num_trees: int = 128
    branching: int = 4
    depth: int = 3
    probabilities: tuple[float, float] = (0.4, 5e-4)
    exponent: float = 0.5
    correlation_rank: int = 25
    correlation_scale: float = 0.1
    magnitudes: tuple[float, float] = (5.0, 4.0)
    spread: tuple[float, float] = (0.5, 0.5)
    bias: float = 0.5
    orthogonal_steps: int = 100
    orthogonal_rate: float = 3e-4
    seed: int = 42

    def __post_init__(self) -> None:
        if min(self.num_features, self.hidden_size) < 1 or min(self.num_trees, self.correlation_rank) < 0:
            raise InputError(
                "A world needs at least one feature and one dimension, and no negative number of trees, got "
                f"{self.num_features}, {self.hidden_size} and {self.num_trees}."
            )
        if self.branching < 2 or self.depth < 0:
            raise InputError(
                f"branching must be at least 2 and depth not negative, got {self.branching}, {self.depth}."
            )
        if self.num_in_trees > self.num_features:
            raise InputError(
                f"{self.num_trees} trees of {self.num_in_trees // self.num_trees} features are more than "
                f"num_features={self.num_features}; take fewer trees."
            )
        if not 0 < self.probabilities[1] <= self.probabilities[0] <= 1:
            raise InputError(f"probabilities must be (largest, smallest) in (0, 1], got {self.probabilities}.")

    @property
    def level_sizes(self) -> list[int]:
        """Features of each level of all trees together."""
        return [self.num_trees * self.branching**level for level in range(self.depth + 1)] if self.num_trees else []

    @property
    def num_in_trees(self) -> int:
        """Features that are part of a tree; the others fire by themselves."""
        return sum(self.level_sizes)

    def scaled(self, num_features: int) -> "SynthBenchSettings":
        """The same with fewer features: dimensions and trees in proportion, the rest as it is.

        With fewer features fewer fire at once, by about the square root.

        Args:
            num_features: how many.
        """
        share = num_features / self.num_features
        trees, size = round(self.num_trees * share), max(1, round(self.hidden_size * share))
        return replace(self, num_features=num_features, num_trees=trees, hidden_size=size)


class SynthBenchWorld:
    """Draws activations of which every feature is known.

    Args:
        settings: of the world.

    Attributes:
        directions: unit rows, (num_features, hidden_size).
        bias: (hidden_size,).
        zipf: the probabilities of Zipf's law, (num_features,) float64.
        raised: those with which features are drawn before parents and siblings silence some, (num_features,) float64.
        magnitudes: mean strengths, (num_features,).
        spreads: standard deviations of the strengths, (num_features,).
        factor: each feature's part in the shared normal numbers, (num_features, correlation_rank).
    """

    def __init__(self, settings: SynthBenchSettings | None = None) -> None:
        self.settings = settings = settings or SynthBenchSettings()
        number, generator = settings.num_features, torch.Generator().manual_seed(settings.seed)
        rows = normalize(torch.randn(number, settings.hidden_size, generator=generator))
        self.directions = pushed_apart(rows, settings.orthogonal_steps, settings.orthogonal_rate)
        self.bias = settings.bias * normalize(torch.randn(settings.hidden_size, generator=generator), dim=0)
        self.zipf = zipf_probabilities(number, settings.exponent, *settings.probabilities)
        self.raised = self._raised()
        self.magnitudes = torch.linspace(*settings.magnitudes, number)
        mean, deviation = settings.spread
        self.spreads = (mean + deviation * torch.randn(number, generator=generator)).abs()
        factor = settings.correlation_scale * torch.randn(number, settings.correlation_rank, generator=generator)
        shared = factor.square().sum(1, keepdim=True)
        self.factor = factor * ((1 - MIN_OWN_SHARE) / shared.clamp_min(1 - MIN_OWN_SHARE)).sqrt()
        self._own = (1 - self.factor.square().sum(1)).sqrt()
        self._border = (math.sqrt(2) * torch.erfinv(1 - 2 * self.raised)).float()

    @property
    def num_features(self) -> int:
        """The number of features."""
        return self.settings.num_features

    @property
    def parents(self) -> Tensor:
        """Each feature's parent, -1 for roots and for features outside the trees, (num_features,) int64."""
        parents = torch.full((self.num_features,), -1)
        for above, below in self._steps():
            parents[below] = torch.arange(above.start, above.stop).repeat_interleave(self.settings.branching)
        return parents

    def _steps(self) -> Iterator[tuple[slice, slice]]:
        """The features of a level and of the next one, from the roots down."""
        start = 0
        for size in self.settings.level_sizes[:-1]:
            middle = start + size
            yield slice(start, middle), slice(middle, middle + size * self.settings.branching)
            start = middle

    def _families(self, values: Tensor) -> Tensor:
        """Values of a level's features, (..., n), by their parents: (..., n / branching, branching)."""
        return values.unflatten(-1, (-1, self.settings.branching))

    def _raised(self) -> Tensor:
        """Probabilities raised for what parents and siblings take: (1/P) (1 + (sum of the siblings' p) / P) times p.

        P is the parent's probability by Zipf's law. This is the source's correction; it is too small, because parents
        themselves fire less often than that.
        """
        raised = self.zipf.clone()
        for above, below in self._steps():
            parent, mine = self.zipf[above].unsqueeze(1), self._families(self.zipf[below])
            others = mine.sum(1, keepdim=True) - mine
            raised[below] = (mine / parent * (1 + others / parent)).flatten()
        return raised.clamp_max(1.0)

    @property
    def probabilities(self) -> Tensor:
        """How often features fire, (num_features,) float64, where whether they do is not correlated.

        A feature that is drawn has a strength above zero with the probability Φ(mean / spread); of N siblings besides
        it that fire too, one of N + 1 is kept.
        """
        ratio = (self.magnitudes / self.spreads.clamp_min(1e-12)).double()
        drawn = self.raised * torch.special.ndtr(ratio)
        fires = drawn.clone()
        for above, below in self._steps():
            fires[below] = (fires[above].unsqueeze(1) * _kept(self._families(drawn[below]))).flatten()
        return fires

    @property
    def l0(self) -> float:
        """Mean number of features that fire at once, where whether they do is not correlated."""
        return self.probabilities.sum().item()

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Samples:
        """Draw samples, float32 on the CPU.

        Args:
            num_samples: how many.
            generator: torch's own by default.
        """
        if num_samples < 1:
            raise InputError(f"num_samples must be at least 1, got {num_samples}.")
        features = torch.empty(num_samples, self.num_features)
        for part in features.split(max(1, NUMBERS_AT_ONCE // self.num_features)):
            part.copy_(self._strengths(len(part), generator))
        return Samples(torch.addmm(self.bias, features, self.directions), features)

    def _strengths(self, number: int, generator: torch.Generator | None) -> Tensor:
        """Strengths of features, (number, num_features)."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        drawn = torch.addmm(
            normal(number, self.num_features) * self._own, normal(number, self.factor.shape[1]), self.factor.T
        )
        rows, columns = (drawn > self._border).nonzero(as_tuple=True)
        strengths = torch.zeros(number, self.num_features)
        strengths[rows, columns] = torch.relu(self.magnitudes[columns] + self.spreads[columns] * normal(len(columns)))
        for above, below in self._steps():
            families = self._families(strengths[:, below])
            # A copy, of which one sibling is left where a parent that fires has several.
            families = families * (strengths[:, above] / self.magnitudes[above]).unsqueeze(-1)
            samples, parents = ((families > 0).sum(-1) > 1).nonzero(as_tuple=True)
            fires = families[samples, parents] > 0
            lots = torch.rand(fires.shape, generator=generator).masked_fill(~fires, -1.0)
            winner = torch.zeros_like(lots).scatter_(-1, lots.argmax(-1, keepdim=True), 1.0)
            families[samples, parents] = families[samples, parents] * winner
            strengths[:, below] = families.flatten(1)
        return strengths


def _kept(drawn: Tensor) -> Tensor:
    """How often each of some siblings is drawn and kept, (families, n), from how often they are drawn.

    E 1/(N + 1) over the other siblings' number N is ∫ Π (1 − q + q t) dt from 0 to 1, whose polynomial is integrated.
    """
    kept = torch.empty_like(drawn)
    for place in range(drawn.shape[1]):
        others = [column for number, column in enumerate(drawn.unbind(1)) if number != place]
        chances = [torch.ones_like(drawn[:, 0])]  # of 0, 1, ... others
        for q in others:
            stay, more = [c * (1 - q) for c in chances], [c * q for c in chances]
            pairs = zip([*stay, torch.zeros_like(q)], [torch.zeros_like(q), *more], strict=True)
            chances = [low + high for low, high in pairs]
        kept[:, place] = drawn[:, place] * sum(chance / (count + 1) for count, chance in enumerate(chances))
    return kept


def zipf_probabilities(number: int, exponent: float, largest: float, smallest: float) -> Tensor:
    """Powers of the rank, brought between the largest and the smallest.

    Args:
        number: of features.
        exponent: of the power; positive.
        largest: the first.
        smallest: the last.

    Returns:
        (number,) float64.
    """
    powers = torch.arange(1, number + 1, dtype=torch.float64) ** -exponent
    if number == 1:
        return torch.tensor([largest], dtype=torch.float64)
    return smallest + (largest - smallest) * (powers - powers[-1]) / (powers[0] - powers[-1])


def pushed_apart(rows: Tensor, steps: int, rate: float) -> Tensor:
    """Make unit rows more orthogonal: Adam on the squares of their cosines, their lengths held near one.

    Args:
        rows: unit rows, (n, d).
        steps: of Adam; 0 leaves the rows.
        rate: its learning rate.

    Returns:
        Unit rows, (n, d).
    """
    moving = rows.clone().requires_grad_()
    optimizer = torch.optim.Adam([moving], lr=rate)
    for _ in range(steps):
        # The gradient of Σ_{i≠j} ⟨i, j⟩² + n Σ_i (⟨i, i⟩ − 1)², a few rows at a time: 4 (G − D) W + 4 n (D − 1) W
        # with G all products and D their diagonal.
        with torch.no_grad():
            own = moving.square().sum(1, keepdim=True)
            gradient = 4 * (len(rows) * (own - 1) - own) * moving
            for part, of_part in zip(moving.split(ROWS_AT_ONCE), gradient.split(ROWS_AT_ONCE), strict=True):
                of_part += 4 * (part @ moving.T) @ moving
        moving.grad = gradient
        optimizer.step()
    return normalize(moving.detach())
