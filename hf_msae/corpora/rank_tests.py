"""Which latents have larger values in one corpus's documents than in another's: rank tests, without the zeros.

A document's value of a latent is 0 where the latent does not fire, and most are. So a latent's documents are compared
by their ranks (Mann and Whitney), which says nothing of how activations are distributed, and the effect is Cliff's
delta: how much likelier a document of B has the larger value than one of A, less how much likelier the smaller.

The p-value comes from the permutation distribution of the rank sum, with all ties: its mean, variance and skewness are
known exactly, and a Pearson III distribution of these three is its tail (Mielke and Berry, Permutation Methods). A
normal one would do where both corpora have as many documents. Where one has twenty times as many, and a latent fires
in ten of them, it takes p for a thousand times smaller than it is, and all rests on tails where a thousand latents are
tested at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# A latent is tested where it fires in so many documents of both corpora together. Which those are does not depend on
# how they are dealt to the corpora, so the choice favours nothing; and fewer could not become a finding.
MIN_FIRING = 10
# Below this skewness the Pearson III distribution is normal for all that can be computed.
NO_SKEW = 1e-3


@dataclass(frozen=True)
class Values:
    """What latents are worth in the documents of a corpus; what is not here is 0.

    Args:
        num_documents: of the corpus.
        latents: (n,) int64.
        values: above 0, (n,).
    """

    num_documents: int
    latents: Tensor
    values: Tensor

    def firing(self, num_latents: int) -> Tensor:
        """In how many documents each latent fires, (num_latents,) int64."""
        return torch.bincount(self.latents, minlength=num_latents)

    def mean(self, num_latents: int) -> Tensor:
        """Of each latent, over all documents, (num_latents,) float64."""
        return torch.bincount(self.latents, self.values.double(), minlength=num_latents) / self.num_documents


@dataclass(frozen=True)
class RankTests:
    """Every latent's test.

    Args:
        tested: which latents fire in enough documents, bool (num_latents,).
        delta: Cliff's delta, above 0 where B has more, (num_latents,) float64.
        p: two-sided, (num_latents,) float64; 1 where nothing was tested.
        q: the smallest false discovery rate at which the latent is a finding (Benjamini and Hochberg), likewise.
    """

    tested: Tensor
    delta: Tensor
    p: Tensor
    q: Tensor


def rank_tests(a: Values, b: Values, num_latents: int, min_firing: int = MIN_FIRING) -> RankTests:
    """Test each latent.

    Args:
        a: of one corpus.
        b: of the other.
        num_latents: of the SAE.
        min_firing: documents in which a latent must fire to be tested.
    """
    n, m = a.num_documents, b.num_documents
    latents, order = torch.cat([a.latents, b.latents]), torch.cat([a.values, b.values]).argsort(stable=True)
    order = order[latents[order].argsort(stable=True)]
    of_b = order >= len(a.latents)
    values, latents = torch.cat([a.values, b.values])[order], latents[order]
    firing = torch.bincount(latents, minlength=num_latents)
    zeros = (n + m - firing).double()
    # Distances of ranks from their mean, (N + 1) / 2: of what fires, and of the zeros, which share one rank.
    middle = (n + m + 1) / 2
    distances = _midranks(latents, values, firing) + zeros[latents] - middle
    of_zeros = (zeros + 1) / 2 - middle

    def total(weights: Tensor, of: Tensor) -> Tensor:
        return torch.bincount(of, weights, minlength=num_latents)

    zeros_of_b = (m - b.firing(num_latents)).double()
    above = total(distances[of_b], latents[of_b]) + zeros_of_b * of_zeros
    squares = total(distances**2, latents) + zeros * of_zeros**2
    cubes = total(distances**3, latents) + zeros * of_zeros**3
    tested = (firing >= min_firing) & (squares > 0)
    p = torch.where(tested, _two_sided(above, squares, cubes, n, m), 1.0)
    q = torch.ones_like(p)
    q[tested] = benjamini_hochberg(p[tested])
    # The rank sum of B is U + m (m + 1) / 2, and delta 2 U / (n m) - 1.
    return RankTests(tested, 2 * above / (n * m), p, q)


def _midranks(latents: Tensor, values: Tensor, firing: Tensor) -> Tensor:
    """Ranks from 1 among the values of the same latent, equal ones sharing the middle of theirs, (n,) float64.

    latents, values: ordered by latent and then by value. firing: how many values each latent has.
    """
    if not len(latents):
        return torch.empty(0, dtype=torch.float64)
    new = torch.ones_like(latents, dtype=torch.bool)
    new[1:] = (latents[1:] != latents[:-1]) | (values[1:] != values[:-1])
    ties = new.cumsum(0) - 1
    sizes = torch.bincount(ties)
    first = (sizes.cumsum(0) - sizes).double()
    begins = (firing.cumsum(0) - firing)[latents]
    return (first + (sizes + 1) / 2)[ties] - begins


def _two_sided(above: Tensor, squares: Tensor, cubes: Tensor, n: int, m: int) -> Tensor:
    """The p-value of a sum of m of n + m numbers, whose mean is 0.

    above: the sum. squares, cubes: sums of all numbers' powers.
    """
    size = n + m
    variance = n * m / (size * (size - 1)) * squares
    third = n * m * (n - m) / (size * (size - 1) * max(1, size - 2)) * cubes
    deviation = variance.clamp_min(1e-30).sqrt()
    skew = third / deviation**3
    # Rank sums come in steps; half a step towards the mean is what they stand for.
    z = above.sign() * (above.abs() - 0.5).clamp_min(0) / deviation
    tails = torch.stack([_upper_tail(z, skew), _upper_tail(-z, -skew)])
    return (2 * tails.amin(0)).clamp_max(1)


def _upper_tail(z: Tensor, skew: Tensor) -> Tensor:
    """The share of a Pearson III distribution of mean 0, variance 1 and some skewness that lies at z and above."""
    normal = torch.special.erfc(z / 2**0.5) / 2
    shape = 4 / skew.abs().clamp_min(NO_SKEW) ** 2
    # A gamma distribution, shifted, and turned round where the skewness is negative.
    at = (shape + z * skew.sign() * shape.sqrt()).clamp_min(0)
    gamma = torch.where(skew > 0, torch.special.gammaincc(shape, at), torch.special.gammainc(shape, at))
    return torch.where(skew.abs() < NO_SKEW, normal, gamma)


def benjamini_hochberg(p: Tensor) -> Tensor:
    """For each test the smallest false discovery rate at which it is a finding, (n,).

    Args:
        p: of the tests, (n,).
    """
    order = p.argsort(descending=True)
    ranks = torch.arange(len(p), 0, -1, dtype=p.dtype)
    q = torch.empty_like(p)
    q[order] = (p[order] * len(p) / ranks).cummin(0).values if len(p) else p
    return q
