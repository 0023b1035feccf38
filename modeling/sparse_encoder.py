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

    Equal to `torch.topk` of all pre-activations where no two are equal. With `ranks`, `count` is that of all processes
    together, each of which has other tokens or other latents and gets what is active of its own.
    """
    share = count / (x.shape[0] * W_enc.shape[0] * ranks.size)
    threshold: Tensor | None = None

    def candidates(tile: Tile) -> Tensor:
        nonlocal threshold
        if threshold is None:
            threshold = ranks.minimum(_sampled_threshold(tile, share))
        return _places_above(tile, threshold)

    def largest(tile: Tile) -> Tensor:
        flat = tile.biased().flatten()
        places = flat.topk(min(count, flat.numel()), sorted=False).indices.sort().values
        return places[flat[places] > 0]

    active = _encode_in_tiles(x, W_enc, b_enc, candidates)
    found = ranks.total(active.values.numel())
    if found < count and threshold is not None and threshold > 0:
        # The sample misled: look again, without a threshold.
        active = _encode_in_tiles(x, W_enc, b_enc, largest)
        found = ranks.total(active.values.numel())
    if found > count:
        active = active.take(_largest_places(active.values, count, ranks))
    return active


def _largest_places(values: Tensor, count: int, ranks: ProcessGroup) -> Tensor:
    """Which of the values (n,) are among the `count` largest over all processes: places, in order, or a mask."""
    if ranks.size == 1:
        return values.topk(count, sorted=False).indices.sort().values
    return among_largest(values.unsqueeze(0), count, ranks)[0]


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

    def largest(tile: Tile) -> Tensor:
        pre = tile.biased()
        values, latents = pre.topk(min(k, pre.shape[1]), dim=-1, sorted=False)
        latents, order = latents.sort(dim=-1)
        starts = torch.arange(pre.shape[0], device=pre.device).unsqueeze(-1) * pre.shape[1]
        return (latents + starts)[values.gather(-1, order) > 0]

    return _encode_in_tiles(x, W_enc, b_enc, largest, (tokens_at_once(W_enc.shape[0], x.device), 1))


def _candidates_per_token(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> ActiveLatents:
    """Positive pre-activations of x (B, d), the k largest of each token among them, and few others."""
    parts = tile_shape(x.shape[0], W_enc.shape[0], x.device)[1]
    thresholds: list[Tensor] = []  # of each tile of tokens, (t, 1)

    def candidates(tile: Tile) -> Tensor:
        pre = tile.biased()
        if tile.latents.start == 0:
            rank = min(pre.shape[1], _rank_with_margin(k / parts, MARGIN_OF_A_TOKEN))
            thresholds.append(pre.topk(rank, dim=-1).values[:, -1:].clamp_min(0))
        return (pre > thresholds[-1]).flatten().nonzero().squeeze(-1)

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

    def exceeding(tile: Tile) -> Tensor:
        nonlocal found
        places = _places_above(tile, threshold[tile.latents])
        found += places.numel()
        if found > limit:
            raise _TooDense
        return places

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
    choose: Callable[[Tile], Tensor],
    shape: tuple[int, int] | None = None,
) -> ActiveLatents:
    """Give what `choose` picks from each tile: places in its flattened product, in order.

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
    found: list[ActiveLatents] = []
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
                found.append(_take_from_tile(tile, choose(tile), first))
    active_tokens, active_latents, values = (torch.cat(pieces) for pieces in zip(*found, strict=True))
    active = ActiveLatents(active_tokens, active_latents, values.to(x.dtype))
    return active if parts == 1 else active.take((active.tokens * num_latents + active.latents).argsort())


def _take_from_tile(tile: Tile, places: Tensor, first_token: int) -> ActiveLatents:
    """The pre-activations at some places of a tile, whose first token is that of the batch."""
    tokens = places.div(tile.product.shape[1], rounding_mode="floor")
    columns = places - tokens * tile.product.shape[1]
    values = tile.product.view(-1)[places]
    if tile.bias is not None:
        values = values + tile.bias[columns]
    return ActiveLatents(tokens + first_token, tile.latents.start + tile.latents.step * columns, values)


def _places_above(tile: Tile, threshold: Tensor) -> Tensor:
    """Places in the flattened tile of what exceeds a threshold (scalar or (l,)), in order."""
    if tile.bias is not None:
        threshold = threshold - tile.bias
    if threshold.dim() == 0 and has_kernels(tile.product):
        from .triton_ops import compact_above

        return compact_above(tile.product, threshold).places
    return (tile.product > threshold).flatten().nonzero().squeeze(-1)


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
