"""Active latents as rows, ragged: of tokens, or pooled over the tokens of each document, and cut into levels.

A row has some latents in ascending order and a value for each. All rows together are three tensors: how many latents
each has, the latents and the values, one row's behind another's. Nothing is ever of size rows × latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Pool = Literal["max", "mean", "sum"]
POOLS: tuple[Pool, ...] = ("max", "mean", "sum")


@dataclass(frozen=True)
class TokenRows:
    """A row for each token, ordered by document and then by position.

    Args:
        documents: of the block that each token is of, (n,) int64.
        positions: in its document, (n,) int64.
        token_ids: (n,) int64.
        counts: active latents of each token, (n,) int64.
        latents: (counts.sum(),) int64.
        values: their activations, above 0, float32.
    """

    documents: Tensor
    positions: Tensor
    token_ids: Tensor
    counts: Tensor
    latents: Tensor
    values: Tensor

    def in_order(self) -> "TokenRows":
        """The same rows, ordered by document and then by position."""
        width = 1 + int(self.positions.max()) if len(self) else 1
        chosen = (self.documents * width + self.positions).argsort()
        return self.take(chosen)

    def take(self, chosen: Tensor) -> "TokenRows":
        """Some of the rows.

        Args:
            chosen: which, (m,) int64, in any order.
        """
        entries = ragged_places(self.counts, chosen)
        return TokenRows(
            self.documents[chosen],
            self.positions[chosen],
            self.token_ids[chosen],
            self.counts[chosen],
            self.latents[entries],
            self.values[entries],
        )

    def __len__(self) -> int:
        return len(self.counts)


@dataclass(frozen=True)
class PooledRows:
    """A row for each document.

    Args:
        num_tokens: that were read of each, (n,) int64.
        counts: latents that are active on any of its tokens, (n,) int64.
        latents: (counts.sum(),) int64.
        values: pooled, float32.
        peaks: where in the document each is largest, the first such place, (counts.sum(),) int64.
        largest: what it is there, float32.
    """

    num_tokens: Tensor
    counts: Tensor
    latents: Tensor
    values: Tensor
    peaks: Tensor
    largest: Tensor

    def __len__(self) -> int:
        return len(self.counts)


def ragged_places(counts: Tensor, chosen: Tensor) -> Tensor:
    """Where the entries of some rows are among those of all.

    Args:
        counts: entries of each row, (n,) int64.
        chosen: rows, (m,) int64, in any order.

    Returns:
        (counts[chosen].sum(),) int64.
    """
    starts, sizes = (counts.cumsum(0) - counts)[chosen], counts[chosen]
    before = sizes.cumsum(0) - sizes
    return torch.arange(int(sizes.sum())) + torch.repeat_interleave(starts - before, sizes)


def pool_rows(rows: TokenRows, num_documents: int, pool: Pool) -> PooledRows:
    """One row a document: the largest activation of each latent, or the sum or mean over all tokens that were read.

    Args:
        rows: of tokens, in order.
        num_documents: of the block.
        pool: which.
    """
    num_tokens = torch.bincount(rows.documents, minlength=num_documents)
    if not len(rows.latents):
        empty = torch.empty(0)
        nothing = torch.empty(0, dtype=torch.int64)
        return PooledRows(num_tokens, torch.zeros_like(num_tokens), nothing, empty, nothing, empty)
    owners = torch.repeat_interleave(rows.documents, rows.counts)
    positions = torch.repeat_interleave(rows.positions, rows.counts)
    width = 1 + int(rows.latents.max())
    # The largest of each group comes first, and of equal ones the first in the text, because both sorts are stable.
    order = rows.values.argsort(descending=True, stable=True)
    order = order[(owners * width + rows.latents)[order].argsort(stable=True)]
    groups, places, sizes = (owners * width + rows.latents)[order].unique_consecutive(
        return_inverse=True, return_counts=True
    )
    first = order[sizes.cumsum(0) - sizes]
    of, largest = groups // width, rows.values[first]
    values = largest
    if pool != "max":
        sums = torch.zeros(len(groups), dtype=torch.float64).index_add_(0, places, rows.values[order].double())
        values = (sums if pool == "sum" else sums / num_tokens[of]).float()
    counts = torch.bincount(of, minlength=num_documents)
    return PooledRows(num_tokens, counts, groups % width, values, positions[first], largest)


def counts_by_level(counts: Tensor, latents: Tensor, sizes: Sequence[int]) -> Tensor:
    """How many latents of each level a row has, (n, levels) int64. Entries stay where they are: rows are ascending.

    Args:
        counts: entries of each row, (n,).
        latents: of the entries.
        sizes: the prefixes.
    """
    levels = torch.searchsorted(torch.tensor(list(sizes)), latents, right=True)
    rows = torch.repeat_interleave(counts)
    return torch.bincount(rows * len(sizes) + levels, minlength=len(counts) * len(sizes)).view(-1, len(sizes))


def keep_documents(rows: TokenRows, kept: Tensor) -> TokenRows:
    """The rows of some documents, numbered anew.

    Args:
        rows: of tokens.
        kept: which documents of the block stay, bool (num_documents,).
    """
    taken = rows.take(kept[rows.documents].nonzero().flatten())
    return replace(taken, documents=(kept.cumsum(0) - 1)[taken.documents])
