"""Activations whose features are known: directions, strengths and noise on top of a forest of features.

An activation is Σ_i a_i·direction_i + noise, with a_i the feature's strength where it fires and 0 elsewhere. Samples
are made a matrix at a time, features by samples, so that each step runs over contiguous memory: children are masked by
their parents one depth after another, and siblings that exclude each other share one uniform number, of which each
owns an interval.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_msae.errors import InputError
from hf_msae.research.toys.trees import Forest

# Samples made at once: what a core's cache holds with a few dozen features. A third faster than all in one piece.
CHUNK = 8192


def make_directions(num_features: int, hidden_size: int, orthogonal: bool, generator: torch.Generator) -> Tensor:
    """Unit rows: a random orthonormal set, or independent random directions.

    Args:
        num_features: rows.
        hidden_size: columns.
        orthogonal: whether they are orthonormal.
        generator: what they are drawn with.

    Returns:
        (num_features, hidden_size).

    Raises:
        InputError: more orthogonal directions are asked for than there are dimensions.
    """
    if orthogonal and num_features > hidden_size:
        raise InputError(
            f"{num_features} features cannot be orthogonal in {hidden_size} dimensions; take hidden_size of at least "
            f"{num_features} or orthogonal=False."
        )
    rows = torch.randn(hidden_size, num_features, generator=generator, dtype=torch.float64)
    if orthogonal:
        rows = torch.linalg.qr(rows).Q
    return torch.nn.functional.normalize(rows, dim=0).T.contiguous()


@dataclass(frozen=True)
class Samples:
    """Activations, and the features that made them.

    Args:
        x: (n, hidden_size).
        features: the strengths of the features, (n, num_features).
    """

    x: Tensor
    features: Tensor


class FeatureWorld:
    """Activations made of the features of a forest.

    Args:
        forest: which features fire together.
        hidden_size: size of the activations.
        orthogonal: orthonormal directions, or independent random ones (which interfere).
        magnitude_spread: each feature's own strength is its forest magnitude times 1 + this times a normal number,
            drawn once (Nabeshima's toy has 0.05).
        sample_spread: where a feature fires, its strength is even over (1 ± this) times its own strength.
        noise: standard deviation per dimension of Gaussian noise.
        seed: of the directions and strengths; samples have generators of their own.
    """

    def __init__(
        self,
        forest: Forest,
        hidden_size: int,
        *,
        orthogonal: bool = True,
        magnitude_spread: float = 0.0,
        sample_spread: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= magnitude_spread <= 0.2:
            raise InputError(
                f"magnitude_spread must be in [0, 0.2], got {magnitude_spread}: far beyond, strengths turn negative."
            )
        if not 0 <= sample_spread <= 1:
            raise InputError(f"sample_spread must be in [0, 1], got {sample_spread}: strengths are never negative.")
        if not 0 <= noise < float("inf"):
            raise InputError(f"noise must be finite and not negative, got {noise}.")
        generator = torch.Generator().manual_seed(seed)
        self.forest, self.hidden_size, self.sample_spread, self.noise = forest, hidden_size, sample_spread, noise
        self.directions = make_directions(forest.num_features, hidden_size, orthogonal, generator)
        draws = torch.randn(forest.num_features, generator=generator, dtype=torch.float64).clamp(-4, 4)
        self.magnitudes = forest.magnitudes * (1 + magnitude_spread * draws)
        self._sources, self._low, self._high = self._intervals()
        self._levels = [(forest.depths == depth).nonzero().flatten() for depth in range(int(forest.depths.max()) + 1)]
        self._rows = (self.directions * self.magnitudes[:, None]).float()

    @property
    def num_features(self) -> int:
        """The number of features."""
        return self.forest.num_features

    def _intervals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Which uniform number decides over each feature, and the interval of it in which the feature fires."""
        sources: list[int] = []
        low: list[float] = []
        shared: dict[int, tuple[int, float]] = {}  # by parent: the children's common number and how much is taken
        used = 0
        for parent, exclusive, probability in zip(
            self.forest.parents.tolist(),
            self.forest.exclusive.tolist(),
            self.forest.conditional.tolist(),
            strict=True,
        ):
            source, start = shared.get(parent, (used, 0.0)) if exclusive else (used, 0.0)
            used = max(used, source + 1)
            if exclusive:
                shared[parent] = (source, start + probability)
            sources.append(source)
            low.append(start)
        begins = torch.tensor(low, dtype=torch.float64)
        return torch.tensor(sources), begins.float(), (begins + self.forest.conditional).float()

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Samples:
        """Draw samples, float32 on the CPU.

        Args:
            num_samples: how many.
            generator: torch's own by default.
        """
        if num_samples < 1:
            raise InputError(f"num_samples must be at least 1, got {num_samples}.")
        sizes = [CHUNK] * (num_samples // CHUNK) + ([num_samples % CHUNK] if num_samples % CHUNK else [])
        x = torch.empty(num_samples, self.hidden_size)
        features = torch.empty(num_samples, self.num_features)
        start = 0
        for size in sizes:
            strengths = self._strengths(size, generator)
            torch.mm(strengths.T, self._rows, out=x[start : start + size])
            torch.mul(strengths.T, self.magnitudes.float(), out=features[start : start + size])
            if self.noise:
                x[start : start + size] += self.noise * torch.randn(size, self.hidden_size, generator=generator)
            start += size
        return Samples(x, features)

    def _strengths(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """Strengths in units of each feature's own, (num_features, num_samples)."""
        uniform = torch.rand(int(self._sources.max()) + 1, num_samples, generator=generator)[self._sources]
        fires = (uniform >= self._low[:, None]) & (uniform < self._high[:, None])
        for rows in self._levels[1:]:
            fires[rows] &= fires[self.forest.parents[rows]]
        strengths = fires.float()
        if self.sample_spread:
            strengths *= 1 + self.sample_spread * (2 * torch.rand(strengths.shape, generator=generator) - 1)
        return strengths

    # Closed forms

    @property
    def feature_mean(self) -> Tensor:
        """E a, (num_features,) float64."""
        return self.forest.probabilities * self.magnitudes

    @property
    def feature_second_moment(self) -> Tensor:
        """E a aᵀ, (num_features, num_features) float64; the strengths of two features are independent."""
        moment = self.forest.joint_probabilities * torch.outer(self.magnitudes, self.magnitudes)
        return moment + torch.diag(moment.diag() * self.sample_spread**2 / 3)

    @property
    def mean(self) -> Tensor:
        """E x, (hidden_size,) float64."""
        return self.feature_mean @ self.directions

    @property
    def covariance(self) -> Tensor:
        """Cov x, (hidden_size, hidden_size) float64."""
        centred = self.feature_second_moment - torch.outer(self.feature_mean, self.feature_mean)
        noise = self.noise**2 * torch.eye(self.hidden_size, dtype=torch.float64)
        return self.directions.T @ centred @ self.directions + noise
