"""How often two latents fire on the same token, and what each gains there, from sparse records.

A token with k active latents has k² pairs. Pairs are counted for a block of children at a time, so that neither the
pairs of all tokens nor a matrix of all latents by all latents is ever held.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_msae.interpret.scan import Firings

PAIRS_AT_ONCE = 1 << 22
COUNTS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class PairSums:
    """Sums over the tokens on which both latents of a pair fire, each (n,) float64.

    Args:
        count: the number of tokens.
        activation: of the first latent.
        gain_of_first: what the first latent gains (`Firings.gains`).
        gain_of_second: what the second one gains.
        energy: of the tokens.
    """

    count: Tensor
    activation: Tensor
    gain_of_first: Tensor
    gain_of_second: Tensor
    energy: Tensor


class Cofirings:
    """Pairs of latents in the tokens of a `Firings`."""

    def __init__(self, firings: Firings, num_latents: int) -> None:
        self.firings, self.num_latents = firings, num_latents
        active = firings.active
        self.count = torch.bincount(active.latents, minlength=num_latents)
        values = active.values.double()
        self.total = torch.bincount(active.latents, values, minlength=num_latents)
        squares = torch.bincount(active.latents, values.square(), minlength=num_latents)
        # The mean activation of each latent, each firing weighed by itself: where most of the activation lies.
        self.typical = squares / self.total.clamp_min(torch.finfo(torch.float64).tiny)
        self.per_token = torch.bincount(active.tokens, minlength=max(1, firings.num_tokens))
        self.token_starts = self.per_token.cumsum(0) - self.per_token
        # The places of each latent among the active ones, one latent after another.
        self.by_latent = active.latents.argsort(stable=True)
        self.latent_starts = self.count.cumsum(0) - self.count

    def counts(self, children: range, num_parents: int) -> Iterator[tuple[range, Tensor]]:
        """Tokens on which each child fires together with each of the first latents.

        Args:
            children: numbers of latents.
            num_parents: how many first latents.

        Yields:
            Blocks of children, and their counts (children, num_parents) int64.
        """
        size = max(1, COUNTS_AT_ONCE // num_parents)
        for low in range(children.start, children.stop, size):
            block = range(low, min(low + size, children.stop))
            counts = torch.zeros(len(block) * num_parents, dtype=torch.int64)
            for first, second in self._pairs(torch.arange(block.start, block.stop)):
                parents, others = self.firings.active.latents[first], self.firings.active.latents[second]
                inside = parents < num_parents
                places = (others[inside] - low) * num_parents + parents[inside]
                counts += torch.bincount(places, minlength=len(counts))
            yield block, counts.view(len(block), num_parents)

    def sums(self, first: Tensor, second: Tensor) -> PairSums:
        """Sums over the tokens that the latents of each pair share.

        Args:
            first: a latent of each pair, (n,) int64; pairs may repeat.
            second: the other.
        """
        keys, where = (second * self.num_latents + first).unique(return_inverse=True)
        active, gains = self.firings.active, self.firings.gains.double()
        sums = torch.zeros(5, len(keys), dtype=torch.float64)
        for left, right in self._pairs(second.unique()):
            pairs = active.latents[right] * self.num_latents + active.latents[left]
            found = torch.searchsorted(keys, pairs).clamp_max(len(keys) - 1)
            wanted = keys[found] == pairs
            left, right, found = left[wanted], right[wanted], found[wanted]
            ones, values = torch.ones(len(left), dtype=torch.float64), active.values[left].double()
            energies = self.firings.energies[active.tokens[left]].double()
            terms = torch.stack([ones, values, gains[left], gains[right], energies])
            sums.index_add_(1, found, terms)
        return PairSums(*sums[:, where])

    def _pairs(self, latents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """All pairs of an active latent (second) that is among `latents` with another of the same token (first).

        They are given as places among the active ones; some at a time.
        """
        counts = self.count[latents]
        if not int(counts.sum()):
            return
        starts = self.latent_starts[latents].repeat_interleave(counts)
        within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        entries = self.by_latent[starts + within]
        widths = self.per_token[self.firings.active.tokens[entries]]
        step = max(1, PAIRS_AT_ONCE // int(widths.max()))
        for part, width in zip(entries.split(step), widths.split(step), strict=True):
            second = part.repeat_interleave(width)
            begins = self.token_starts[self.firings.active.tokens[part]].repeat_interleave(width)
            offsets = torch.arange(len(second)) - (width.cumsum(0) - width).repeat_interleave(width)
            first = begins + offsets
            other = first != second
            yield first[other], second[other]
