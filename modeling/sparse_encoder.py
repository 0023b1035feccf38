# Copyright 2026 The hf_msae authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Which latents are active, without sorting and without the matrix of all pre-activations.

The encoder's product is computed a tile at a time, all tokens (or as many as a tile may have) by every n-th latent,
and only what may be active leaves the tile. Tiles are cut between latents because then each weight is read from memory
once: cut between tokens, the product of 2,048 tokens with 65,536 latents of width 1,024 took half as long again on two
CPU cores. They take every n-th latent, not neighbours, because the latents of a Matryoshka dictionary are ordered, and
a tile of early ones would say little about the rest.

- `batch_topk`: the first tile suggests a threshold that rather more than the wanted number will exceed; the exact
  selection is made among the candidates above it. Too few candidates mean that the sample misled; then all is looked
  at again.
- `topk`: the same with a threshold for each token.
- thresholds that are known: what exceeds them.

Shapes: B tokens, d = hidden_size, F = num_latents, n active latents in all.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .devices import has_kernels, sent
from .selection import SINGLE_PROCESS, ProcessGroup, among_largest

# Numbers of a tile of pre-activations: on the CPU what stays in the caches until it is searched, on a GPU what fills
# it. And the most tokens of a tile, so that it has latents enough for a product.
CPU_TILE = 1 << 21
GPU_TILE = 1 << 29
CPU_TILE_TOKENS = 1 << 11
GPU_TILE_TOKENS = 1 << 15
# Pre-activations of all latents that exist at once where latents are measured, in numbers.
CPU_CHUNK = 1 << 23
GPU_CHUNK = 1 << 29
# How many of a tile's pre-activations are looked at to guess a threshold.
SAMPLES = 1 << 18
# How many times the wanted number of candidates a threshold is to leave. Sampled latents are those that fire often or
# those that do not, so a tile of some latents must leave more than one of some tokens; candidates cost little.
# The same for each token; there the few that go short can be looked at again by themselves.
MARGIN = 1.1
MARGIN_OF_SOME_LATENTS = 2.5
MARGIN_OF_A_TOKEN = 1.5
# Weights, in numbers, that stay in the caches from one tile to the next. Up to here, each token's k largest are found
# sooner in tiles of all latents: 32 of 4,096 of width 256 in two thirds of the time. Beyond, tiles of some latents do
# it: 32 of 65,536 of width 1,024 in two thirds of the time.
CACHED_WEIGHTS = 1 << 23
# With a larger share s of latents active the dense products are used. Measured on two CPU cores: at 1/8 the sparse
# path takes half the time of the dense one, at 1/4 nine tenths. On a GPU (an estimate, for an H100) the dense path
# takes four products more, 8·B·F·d operations at 600 TFLOP/s in bfloat16, and the sparse one reads s·B·F rows of d
# numbers four times, 16·s·B·F·d bytes at 3.35 TB/s: the same at s = 1/360; in TF32, at half that rate, at 1/180.
CPU_DENSE_SHARE = 1 / 8
GPU_DENSE_SHARE = 1 / 256


class ActiveLatents(NamedTuple):
    """The active latents of some tokens, ordered by token and then by latent: three tensors (n,)."""

    tokens: Tensor
    latents: Tensor
    values: Tensor

    def to_dense(self, num_tokens: int, num_latents: int) -> Tensor:
        """Latent activations (num_tokens, num_latents)."""
        dense = self.values.new_zeros(num_tokens, num_latents)
        return dense.index_put((self.tokens, self.latents), self.values)

    def take(self, chosen: Tensor) -> "ActiveLatents":
        """Those at some places (m,), or where a mask (n,) is true."""
        return ActiveLatents(*(part[chosen] for part in self))

    def split(self, sizes: Sequence[int]) -> "list[ActiveLatents]":
        """Those of the first `sizes[0]` tokens, of the next `sizes[1]`, and so on; each counts its tokens from 0."""
        ends = sent(torch.tensor(sizes).cumsum(0), self.tokens.device)
        numbers = torch.searchsorted(self.tokens, ends).diff(prepend=ends.new_zeros(1)).tolist()
        parts = zip(*(part.split(numbers) for part in self), strict=True)
        begins = [0, *ends[:-1].tolist()]
        return [
            ActiveLatents(tokens - begin, latents, values)
            for begin, (tokens, latents, values) in zip(begins, parts, strict=True)
        ]


class Tile(NamedTuple):
    """Some of the pre-activations: the product (t, l) of some tokens and latents, and which latents these are.

    The bias (l,) is what the product still lacks; None where it has it.
    """

    product: Tensor
    bias: Tensor | None
    latents: slice

    def biased(self) -> Tensor:
        """The pre-activations (t, l)."""
        return self.product if self.bias is None else self.product + self.bias

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Some places (m,) of the flattened tile, and the pre-activations (m,) there."""
        values = self.product.view(-1)[places]
        return places, values if self.bias is None else values + self.bias[places % self.product.shape[1]]


def tile_shape(num_tokens: int, num_latents: int, device: torch.device) -> tuple[int, int]:
    """How many tokens a tile has, and into how many parts the latents are dealt."""
    size, longest = (GPU_TILE, GPU_TILE_TOKENS) if device.type != "cpu" else (CPU_TILE, CPU_TILE_TOKENS)
    tokens = max(1, min(num_tokens, longest))
    return tokens, min(num_latents, max(1, -(-tokens * num_latents // size)))


def tokens_at_once(num_latents: int, device: torch.device) -> int:
    """How many tokens' pre-activations of all latents exist at the same time where latents are measured."""
    return max(1, (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // max(1, num_latents))


def dense_share(device: torch.device) -> float:
    """The share of active latents beyond which the dense products are sooner done."""
    return CPU_DENSE_SHARE if device.type == "cpu" else GPU_DENSE_SHARE


@torch.no_grad()
def select_largest(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, count: int, ranks: ProcessGroup = SINGLE_PROCESS
) -> ActiveLatents:
    """The `count` largest positive pre-activations of activations x (B, d), from which b_dec is subtracted already.

    Equal to `torch.topk` of all pre-activations where no two are equal. Of those that equal the smallest, the first by
    token and latent are taken; any, where the sample misled, and on a GPU without kernels. With `ranks`, `count` is
    that of all processes together, each of which has other tokens or other latents and gets what is active of its own.
    """
    share = count / (x.shape[0] * W_enc.shape[0] * ranks.size)
    threshold: Tensor | None = None

    def candidates(tile: Tile) -> tuple[Tensor, Tensor]:
        nonlocal threshold
        if threshold is None:
            threshold = ranks.minimum(_sampled_threshold(tile, share))
        return _exceeding(tile, threshold)

    def largest(tile: Tile) -> tuple[Tensor, Tensor]:
        flat = tile.biased().flatten()
        chosen = flat.topk(min(count, flat.numel()), sorted=False).indices.sort().values
        return tile.at(chosen[flat[chosen] > 0])

    places, values = _search_in_tiles(x, W_enc, b_enc, candidates)
    found = ranks.total(values.numel())
    if found < count and threshold is not None and threshold > 0:
        # The sample misled: look again, without a threshold.
        places, values = _search_in_tiles(x, W_enc, b_enc, largest)
        found = ranks.total(values.numel())
    if found > count:
        places, values = _keep_largest(places, values, count, ranks)
    return _located(places, values.to(x.dtype), W_enc.shape[0])


def _keep_largest(places: Tensor, values: Tensor, count: int, ranks: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Those of some places and values (m,) that are among the `count` largest over all processes, in order."""
    if ranks.size > 1:
        chosen = among_largest(values.unsqueeze(0), count, ranks)[0]
    elif has_kernels(values):
        from .triton_ops import compact_largest

        return compact_largest(places, values, count)
    else:
        chosen = _places_of_largest(values, count)
    return places[chosen], values[chosen]


def _places_of_largest(values: Tensor, count: int) -> Tensor:
    """Places (count,), in order, of the `count` largest of the values (m,); on the CPU the first of equal ones."""
    largest = values.topk(count, sorted=False)
    if values.is_cuda:  # which would wait to know how many there are of what follows
        return largest.indices.sort().values
    # Sooner done than sorting: 65,536 of 85,000 values in 1.0 ms in place of 1.5, on one core.
    border = largest.values.min()
    places = (values >= border).nonzero().squeeze(-1)
    surplus = places.numel() - count
    if surplus:
        kept = torch.ones_like(places, dtype=torch.bool)
        kept[(values[places] == border).nonzero().squeeze(-1)[-surplus:]] = False
        places = places[kept]
    return places


@torch.no_grad()
def select_largest_per_token(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, ranks: ProcessGroup = SINGLE_PROCESS
) -> ActiveLatents:
    """Select the k largest positive pre-activations of each token of x (B, d).

    With `ranks`, these are the same tokens in every process and other latents in each.
    """
    parts = tile_shape(x.shape[0], W_enc.shape[0], x.device)[1]
    whole_rows = parts == 1 or W_enc.numel() <= CACHED_WEIGHTS
    find = _largest_of_whole_rows if whole_rows else _candidates_per_token
    active = find(x, W_enc, b_enc, k)
    if whole_rows and ranks.size == 1:
        return active
    values, columns = _by_token(active, x.shape[0])
    if ranks.size > 1:
        kept = among_largest(values, k, ranks)
    else:
        largest = values.topk(min(k, values.shape[1]), dim=-1, sorted=False).indices
        kept = torch.zeros_like(values, dtype=torch.bool).scatter_(1, largest, True)
    return active.take(kept[active.tokens, columns])


def _largest_of_whole_rows(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> ActiveLatents:
    """The k largest positive pre-activations of each token of x (B, d), from tiles of all latents."""

    def largest(tile: Tile) -> tuple[Tensor, Tensor]:
        pre = tile.biased()
        values, latents = pre.topk(min(k, pre.shape[1]), dim=-1, sorted=False)
        latents, order = latents.sort(dim=-1)
        starts = torch.arange(pre.shape[0], device=pre.device).unsqueeze(-1) * pre.shape[1]
        return tile.at((latents + starts)[values.gather(-1, order) > 0])

    return _encode_in_tiles(x, W_enc, b_enc, largest, (tokens_at_once(W_enc.shape[0], x.device), 1))


def _candidates_per_token(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> ActiveLatents:
    """Positive pre-activations of x (B, d), the k largest of each token among them, and few others."""
    parts = tile_shape(x.shape[0], W_enc.shape[0], x.device)[1]
    thresholds: list[Tensor] = []  # of each tile of tokens, (t, 1)

    def candidates(tile: Tile) -> tuple[Tensor, Tensor]:
        pre = tile.biased()
        if tile.latents.start == 0:
            rank = min(pre.shape[1], _rank_with_margin(k / parts, MARGIN_OF_A_TOKEN))
            thresholds.append(pre.topk(rank, dim=-1).values[:, -1:].clamp_min(0))
        return tile.at((pre > thresholds[-1]).flatten().nonzero().squeeze(-1))

    active = _encode_in_tiles(x, W_enc, b_enc, candidates)
    # Not counted by `bincount`, for which a GPU keeps the CPU waiting.
    ends = torch.arange(x.shape[0], device=x.device)
    missing = torch.searchsorted(active.tokens, ends, right=True).diff(prepend=ends.new_zeros(1)) < k
    short = missing & (torch.cat(thresholds).squeeze(-1) > 0)
    if not short.any():
        return active
    # The first tile misled about these tokens.
    again = short.nonzero().squeeze(-1)
    whole = _largest_of_whole_rows(x[again], W_enc, b_enc, k)
    active = active.take(~short[active.tokens])
    merged = ActiveLatents(
        torch.cat([active.tokens, again[whole.tokens]]),
        torch.cat([active.latents, whole.latents]),
        torch.cat([active.values, whole.values]),
    )
    return merged.take(merged.tokens.argsort(stable=True))


def _by_token(active: ActiveLatents, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Give the values with a row for each token, (num_tokens, most of a token), filled up with zeros.

    The second result is the column of each value (n,).
    """
    begins = torch.searchsorted(active.tokens, torch.arange(num_tokens, device=active.tokens.device))
    columns = torch.arange(active.tokens.numel(), device=active.tokens.device) - begins[active.tokens]
    width = int(columns.max()) + 1 if columns.numel() else 1
    values = active.values.new_zeros(num_tokens, width)
    values[active.tokens, columns] = active.values
    return values, columns


@torch.no_grad()
def select_exceeding(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> ActiveLatents | None:
    """The pre-activations of x (B, d) above the threshold (F,); None where they are too many to be worth it."""
    limit = dense_share(x.device) * x.shape[0] * W_enc.shape[0]
    found = 0

    def exceeding(tile: Tile) -> tuple[Tensor, Tensor]:
        nonlocal found
        places, values = _exceeding(tile, threshold[tile.latents])
        found += places.numel()
        if found > limit:
            raise _TooDense
        return places, values

    try:
        return _encode_in_tiles(x, W_enc, b_enc, exceeding)
    except _TooDense:
        return None


class _TooDense(Exception):
    """Ends the search for latents that turn out to be too many."""


def _encode_in_tiles(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    choose: Callable[[Tile], tuple[Tensor, Tensor]],
    shape: tuple[int, int] | None = None,
) -> ActiveLatents:
    """Give the latents that `choose` picks from each tile (see `_search_in_tiles`)."""
    places, values = _search_in_tiles(x, W_enc, b_enc, choose, shape)
    return _located(places, values.to(x.dtype), W_enc.shape[0])


def _located(places: Tensor, values: Tensor, num_latents: int) -> ActiveLatents:
    """Values (n,) at places (n,) of the flattened matrix (B, num_latents), as active latents."""
    tokens = places.div(num_latents, rounding_mode="floor")
    return ActiveLatents(tokens, places - tokens * num_latents, values)


def _search_in_tiles(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    choose: Callable[[Tile], tuple[Tensor, Tensor]],
    shape: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Give what `choose` picks from each tile: places in its flattened product, in order, and pre-activations there.

    In the result places are those of the flattened matrix (B, F), in order. Values are of the product's dtype.

    Tiles have the shape that `tile_shape` says, or another one of its kind; those of the same tokens follow each
    other. The bias is added where something was picked. On the CPU, adding it everywhere would cost a tenth of the
    product, and so would fresh memory for each tile; so all share one buffer.
    """
    device, num_latents = x.device.type, W_enc.shape[0]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    inputs, weights, bias = x.to(dtype), W_enc.to(dtype), b_enc.to(dtype)
    tokens, parts = shape or tile_shape(x.shape[0], num_latents, x.device)
    tokens = min(tokens, max(1, x.shape[0]))
    buffer = torch.empty(tokens * -(-num_latents // parts), dtype=dtype, device=x.device)
    with_bias = _product_takes_bias(x)
    found: list[tuple[Tensor, Tensor]] = []
    with torch.autocast(device, enabled=False):
        for first in range(0, max(1, x.shape[0]), tokens):
            here = inputs[first : first + tokens]
            for part in range(parts):
                latents = slice(part, None, parts)
                rows = weights[latents]
                product = buffer[: here.shape[0] * rows.shape[0]].view(here.shape[0], rows.shape[0])
                if with_bias:
                    torch.addmm(bias[latents], here, rows.T, out=product)
                else:
                    torch.mm(here, rows.T, out=product)
                tile = Tile(product, None if with_bias else b_enc[latents], latents)
                places, values = choose(tile)
                found.append((_places_in_batch(tile, places, first, num_latents), values))
    if len(found) == 1:
        return found[0]
    places, values = (torch.cat(pieces) for pieces in zip(*found, strict=True))
    if parts == 1:
        return places, values
    places, order = places.sort()
    return places, values[order]


def _places_in_batch(tile: Tile, places: Tensor, first_token: int, num_latents: int) -> Tensor:
    """Places of a tile, whose first token is that of the batch, as places of the batch's matrix (B, num_latents)."""
    begin, step, width = first_token * num_latents + tile.latents.start, tile.latents.step, tile.product.shape[1]
    if step > 1:
        tokens = places.div(width, rounding_mode="floor")
        # A token's row ends step * width places after it began in the tile, and num_latents after it in the matrix.
        places = places * step + tokens * (num_latents - step * width)
    return places + begin if begin else places


def _exceeding(tile: Tile, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Places in the flattened tile of what exceeds a threshold (scalar or (l,)), in order, and the values there."""
    if tile.bias is not None:
        threshold = threshold - tile.bias
    if threshold.dim() == 0 and has_kernels(tile.product):
        from .triton_ops import compact_above

        return compact_above(tile.product, threshold)[:2]
    return tile.at((tile.product > threshold).flatten().nonzero().squeeze(-1))


def _product_takes_bias(x: Tensor) -> bool:
    """Whether adding the bias is part of the matrix product: for a GPU it is, a CPU copies it to the result first."""
    return x.device.type != "cpu"


def _sampled_threshold(tile: Tile, share: float) -> Tensor:
    """A number, not below zero, that rather more than `share` of the pre-activations exceed, judged by a sample."""
    flat = tile.product.view(-1)
    # An odd stride visits every latent, also where their number is a power of two.
    stride = max(1, flat.numel() // SAMPLES) | 1
    sample = flat[::stride]
    if tile.bias is not None:
        columns = torch.arange(0, flat.numel(), stride, device=flat.device) % tile.product.shape[1]
        sample = sample + tile.bias[columns]
    margin = MARGIN if tile.latents.step == 1 else MARGIN_OF_SOME_LATENTS
    rank = min(sample.numel(), _rank_with_margin(sample.numel() * share, margin))
    return sample.topk(rank, sorted=True).values[-1].clamp_min(0)


def _rank_with_margin(expected: float, margin: float) -> int:
    """Give the rank in a sample that leaves enough candidates.

    That is five standard deviations of the sampling, and a margin for samples that differ from the rest.
    """
    return int(margin * expected + 5 * expected**0.5) + 2
