"""Contexts of latents, collected while text streams by, in memory that does not grow with it.

Two collections are kept per latent. The top contexts: of every window the strongest token, of all windows the
strongest few. And a sample: tokens on which the latent fires, each with the same chance, from which quantiles of its
activation follow. The sample is drawn by keeping the highest of pseudo-random scores that are a hash of the window's
tokens, the place in it and the latent. So both are "the highest scores", and neither depends on the order of the
documents; ties are broken by the same hash.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NO_TOKEN = -1
_MULTIPLIER = 6364136223846793005


class Contexts(NamedTuple):
    """Stretches of tokens, one a row.

    Args:
        token_ids: (..., length) int32, NO_TOKEN where the window was shorter.
        activations: of one latent on each token, (..., length) float32.
        position: the column of the token for which the context was taken, (...,) int64.
    """

    token_ids: Tensor
    activations: Tensor
    position: Tensor


class ContextStore:
    """The `size` contexts with the highest scores of each latent.

    scores: (num_latents, size) float64, descending, -inf where there are fewer. contexts: (num_latents, size, ...).
    """

    def __init__(self, num_latents: int, size: int, length: int) -> None:
        self.size = size
        self.scores = torch.full((num_latents, size), -torch.inf, dtype=torch.float64)
        self.ties = torch.zeros(num_latents, size, dtype=torch.int64)
        self.contexts = Contexts(
            torch.full((num_latents, size, length), NO_TOKEN, dtype=torch.int32),
            torch.zeros(num_latents, size, length),
            torch.zeros(num_latents, size, dtype=torch.int64),
        )

    def may_enter(self, latents: Tensor, scores: Tensor) -> Tensor:
        """Which of these could be among the highest of their latents.

        Args:
            latents: (n,) int64.
            scores: (n,) float64.

        Returns:
            Places among those given, (m,) int64.
        """
        return (scores >= self.scores[latents, -1]).nonzero().flatten()

    def offer(self, latents: Tensor, scores: Tensor, ties: Tensor, build: Callable[[Tensor], Contexts]) -> None:
        """Keep those that are among the highest of their latents.

        Args:
            latents: (n,) int64.
            scores: (n,) float64.
            ties: which of equal scores is kept: that with the larger tie, (n,) int64.
            build: the contexts of some of the places 0 … n − 1, for those alone that are kept.
        """
        kept, ranks = best_of_each(latents, scores, ties, self.size)
        if not len(kept):
            return
        affected, rows = latents[kept].unique(return_inverse=True)
        built = build(kept)
        fresh_scores = torch.full((len(affected), self.size), -torch.inf, dtype=torch.float64)
        fresh_scores[rows, ranks] = scores[kept].double()
        fresh_ties = torch.zeros(len(affected), self.size, dtype=torch.int64)
        fresh_ties[rows, ranks] = ties[kept]
        both = torch.cat([self.scores[affected], fresh_scores], 1)
        both_ties = torch.cat([self.ties[affected], fresh_ties], 1)
        order = both_ties.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, both.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, : self.size]
        self.scores[affected] = both.gather(1, order)
        self.ties[affected] = both_ties.gather(1, order)
        lines = torch.arange(len(affected)).unsqueeze(1)
        for part, new in zip(self.contexts, built, strict=True):
            fresh = part.new_zeros(len(affected), self.size, *part.shape[2:])
            fresh[rows, ranks] = new.to(part.dtype)
            part[affected] = torch.cat([part[affected], fresh], 1)[lines, order]

    def of(self, latent: int) -> Contexts:
        """The contexts of one latent, the highest score first, (n, ...).

        Args:
            latent: its number.
        """
        count = int((self.scores[latent] > -torch.inf).sum())
        return Contexts(*(part[latent, :count] for part in self.contexts))


def best_of_each(groups: Tensor, scores: Tensor, ties: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each group, of equal ones those with the higher tie.

    Args:
        groups: (n,) int64.
        scores: (n,).
        ties: (n,) int64.
        size: how many of each group.

    Returns:
        Their places (m,), and their ranks (m,) from 0.
    """
    order = ties.argsort(descending=True, stable=True)
    order = order[scores[order].argsort(descending=True, stable=True)]
    order = order[groups[order].argsort(stable=True)]
    grouped = groups[order]
    first = torch.ones_like(grouped, dtype=torch.bool)
    first[1:] = grouped[1:] != grouped[:-1]
    places = torch.arange(len(grouped))
    ranks = places - torch.where(first, places, 0).cummax(0).values if len(grouped) else places
    kept = ranks < size
    return order[kept], ranks[kept]


def window_hashes(token_ids: Tensor) -> Tensor:
    """A hash of the tokens of each window.

    Args:
        token_ids: (windows, length), with NO_TOKEN behind a window's end.

    Returns:
        (windows,) int64.
    """
    powers = torch.full((token_ids.shape[1],), _MULTIPLIER, dtype=torch.int64).cumprod(0)
    # Products and sums wrap around, which is what makes a polynomial hash of 64 bits.
    return _mixed(((token_ids.long() + 1) * powers).sum(1))


def place_hashes(windows: Tensor, positions: Tensor, latents: Tensor) -> Tensor:
    """A hash of a window's hash, a position and a latent.

    Args:
        windows: hashes, (n,) int64.
        positions: (n,) int64.
        latents: (n,) int64.

    Returns:
        (n,) int64.
    """
    return _mixed(_mixed(windows + positions * 0x9E3779B9) + latents * 0x85EBCA6B)


def as_uniform(hashes: Tensor) -> Tensor:
    """Hashes as numbers from 0 to 1, float64.

    Args:
        hashes: (n,) int64.
    """
    return ((hashes >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every bit of the input changes half of the output's."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
