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
"""Kernels of the sparse training step for GPUs, in Triton: what `sparse_ops` asks of torch on the CPU.

Torch's `embedding_bag` gives a thread a column and walks each bag from end to end, one row after the other, and
`nonzero` needs a mask of the whole matrix and two passes over it. Here:

- `segment_sum` loads several rows at once and cuts long segments, so that a latent that is active on the whole batch
  does not keep everyone waiting;
- `segment_dot` gives each warp some places, whose rows it multiplies without any other warp;
- `compact_above` reads the pre-activations once;
- `compact_largest` keeps the order of its candidates, which so need no sorting.

Nothing is added atomically: the same input gives the same bits on every run. Sums are float32 whatever the input. All
of it is bound by memory, so block sizes follow from how much a warp must have under way, not from arithmetic, and the
same ones serve Ampere and Hopper. They were chosen from the compiled code (registers, width of loads), not by timing.

Without a GPU the kernels run in Triton's interpreter (`TRITON_INTERPRET=1` before the import of triton), which is how
their tests work on any machine. Shapes: S segments, n places, d = hidden_size, F = num_latents, B tokens. All indices
are int64, and so are all offsets computed from them.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

try:  # Because transformers asks every reader of a checkpoint for what its code imports, except inside a `try`.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("triton_ops needs triton. sparse_ops does not: ask `runs_kernels` first.") from error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Columns of a row that one warp holds: a kilobyte of float32, so that loads are 128 bits a thread and whole cache
# lines. Most hidden sizes are multiples; where d is not, the last block is masked. Programs of one block of columns
# run together (the grid's first axis is the fastest), so that L2 holds that part of a table and not some rows of it:
# 256 columns of 32,768 float32 rows are 32 MiB, and an A100 has 40, an H100 50.
COLUMNS = 256
# Rows that a warp loads at once: 8 KiB. The twenty warps that fit a multiprocessor's registers (71 to 96 a thread, by
# compiling for both) have 160 KiB under way, several times what hides the latency of HBM3.
ROWS = 8
# Places whose dot products a warp computes at once. Each needs two rows, hence half as many.
PLACES = 4
# Longest run of places that one program sums row by row. A segment takes at most twice this and length / SPLIT partial
# sums: for one of 65,536 places 768 rows, eight at a time.
SPLIT = 128
# Entries that one program of `compact_above` looks at, 32 for each thread of four warps, and how many a word of the
# mask holds.
BLOCK = 4096
WORD = 32
# Candidates that one program of `compact_largest` takes at once, 8 for each thread of four warps; and into how many
# spans they are cut at most. A program reads the counts of all spans, which so stay few whatever there are candidates.
CANDIDATES = 1024
SPANS = 1024
# A single warp waits for no other. Whether products and sums are fused is stated because the default changes between
# releases of Triton, and with it the last bits of a sum.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


class Compacted(NamedTuple):
    """Entries above a threshold: their places in flattened order and values, both (m,), and how many there are.

    `total` is a scalar tensor, int64.
    """

    places: Tensor
    values: Tensor
    total: Tensor


def segment_sum(table: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Weighted sums (S, d), float32, of the rows of a table (R, d): `embedding_bag` in the mode "sum".

    Segment s is the places offsets[s] to offsets[s + 1], or to n for the last; `rows` and `weights` are (n,) and
    `offsets` (S,) rises from 0. An empty segment gives zeros.

    Segments may be as long as a batch (a latent that is always active) beside thousands of a few places. The places
    are therefore cut into blocks of `SPLIT`, wherever segments begin. A first pass sums every block that lies in one
    segment only; a second gives each segment its first and last incomplete block and the partial sums between them. So
    both passes have programs of bounded length, their number is known without asking the GPU, and where all segments
    are short the first pass ends at once.

    Raises `ValueError` for other dtypes than float32, bfloat16 and float16, which torch must compute.
    """
    _check_dtypes(table, weights)
    table, rows, weights, offsets = (tensor.contiguous() for tensor in (table, rows, weights, offsets))
    (num_segments,), (num_places,), hidden_size = offsets.shape, rows.shape, table.shape[1]
    out = torch.empty(num_segments, hidden_size, dtype=torch.float32, device=table.device)
    if out.numel() == 0:
        return out
    num_blocks = num_places // SPLIT
    partials = torch.empty(num_blocks, hidden_size, dtype=torch.float32, device=table.device)
    column_blocks = triton.cdiv(hidden_size, COLUMNS)
    with torch.cuda.device_of(table):
        if num_blocks:
            first = torch.arange(0, num_blocks * SPLIT, SPLIT, device=table.device)
            ends = torch.searchsorted(offsets, torch.stack((first, first + SPLIT - 1)), right=True)
            _block_sums[(num_blocks, column_blocks)](
                partials, table, rows, weights, ends[0] == ends[1], hidden_size, SPLIT, ROWS, COLUMNS, **OPTIONS
            )
        _segment_sums[(num_segments, column_blocks)](
            out,
            partials,
            table,
            rows,
            weights,
            offsets,
            num_segments,
            num_places,
            hidden_size,
            SPLIT,
            ROWS,
            COLUMNS,
            **OPTIONS,
        )
    return out


def segment_dot(grads: Tensor, table: Tensor, rows: Tensor, bags: Tensor) -> Tensor:
    """Dot products (n,), float32, of grads[bags] and table[rows]: the gradient of `segment_sum` for its weights.

    `grads` is (S, d), `table` (R, d), `rows` and `bags` (n,). The order of the bags is free, but neighbours that share
    one are read from L1.

    Raises `ValueError` for other dtypes than float32, bfloat16 and float16, which torch must compute.
    """
    _check_dtypes(grads, table)
    grads, table, rows, bags = (tensor.contiguous() for tensor in (grads, table, rows, bags))
    out = torch.empty(rows.shape, dtype=torch.float32, device=table.device)
    if out.numel():
        with torch.cuda.device_of(table):
            _dots[(triton.cdiv(out.numel(), PLACES),)](
                out, grads, table, rows, bags, out.numel(), table.shape[1], PLACES, COLUMNS, **OPTIONS
            )
    return out


def compact_above(pre: Tensor, threshold: Tensor, capacity: int | None = None) -> Compacted:
    """Places (int64, increasing) and values of the entries of pre (B, F) that exceed `threshold`, a scalar tensor.

    As in torch, the threshold is first rounded to the dtype of `pre`, and NaN exceeds nothing.

    Without `capacity` there are exactly `total` of them, and the CPU waits for the GPU once, to know how many. With it
    the CPU never waits: the results are (capacity,), whatever does not fit is left out, and free entries at the end
    hold the place B·F and the value -inf. Whether all fitted, `total` tells, once someone asks for it.

    The first pass reads `pre` and keeps a bit per entry, from which the second finds the places. The pre-activations,
    the largest tensor of a step, are so read once, and not again to write what exceeds.

    Raises `ValueError` for a threshold per latent, and for other dtypes than float32, bfloat16 and float16: torch must
    compute those.
    """
    _check_dtypes(pre)
    if threshold.numel() != 1:
        raise ValueError(
            f"compact_above compares with one threshold, got {tuple(threshold.shape)}: use torch instead."
        )
    pre, threshold = pre.contiguous(), threshold.to(pre)
    num_blocks = triton.cdiv(pre.numel(), BLOCK)
    words = torch.empty(num_blocks, BLOCK // WORD, dtype=torch.int32, device=pre.device)
    counts = torch.zeros(num_blocks + 1, dtype=torch.int32, device=pre.device)
    with torch.cuda.device_of(pre):
        if num_blocks:
            _mark_above[(num_blocks,)](
                words, counts, pre, threshold, pre.numel(), BLOCK, WORD, **{**OPTIONS, "num_warps": 4}
            )
        # The leading zero makes these the places of each block's first entry; the last is the number of all.
        first = counts.cumsum(0)
        size = int(first[-1]) if capacity is None else capacity
        places = torch.empty(size, dtype=torch.int64, device=pre.device)
        values = torch.empty(size, dtype=pre.dtype, device=pre.device)
        if capacity is not None:  # else none stays free
            places.fill_(pre.numel())
            values.fill_(-torch.inf)
        if num_blocks and size:
            _write_above[(num_blocks,)](places, values, words, first, pre, size, BLOCK, WORD, **OPTIONS)
    return Compacted(places, values, first[-1])


def compact_largest(places: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of candidates, given as places and values (n,), those with the `count` largest values, in the order they have.

    Of values that equal the smallest of these the first are taken, so that there are exactly `count` (or n, if that is
    less), and the same ones on every run. The CPU waits for nothing. `places` are any int64 that belong to the values,
    such as `compact_above` gives. Values must not be NaN, which exceeds no threshold; among candidates with NaN the
    first `count` are given.

    The border, the smallest value that may be taken, is that of `torch.topk`, which reads the values once for each of
    their bytes; what it says of places is in no order. A first pass then counts, in each span of candidates, those
    above the border and those that equal it. A second knows by the counts of the spans before where its own belong.

    Raises `ValueError` for other dtypes than float32, bfloat16 and float16, which torch must compute.
    """
    _check_dtypes(values)
    (size,) = values.shape
    if not 0 < count < size:
        return places[:count], values[:count]
    places, values = places.contiguous(), values.contiguous()
    border = values.topk(count, sorted=False).values.min()
    span = triton.cdiv(triton.cdiv(size, SPANS), CANDIDATES) * CANDIDATES
    grid = (triton.cdiv(size, span),)
    counts = torch.empty(2, SPANS, dtype=torch.int64, device=values.device)
    out = torch.empty(count, dtype=torch.int64, device=values.device), values.new_empty(count)
    options = {**OPTIONS, "num_warps": 4}
    with torch.cuda.device_of(values):
        _count_largest[grid](counts, values, border, size, span, SPANS, CANDIDATES, **options)
        _write_largest[grid](*out, counts, places, values, border, size, span, count, SPANS, CANDIDATES, **options)
    return out


def check_kernels(device: torch.device) -> None:
    """Launch every kernel once, in the form that training does, and compare what comes out with torch.

    Raises `RuntimeError` where they differ, and whatever Triton raises where it cannot compile or launch.
    """
    generator = torch.Generator().manual_seed(0)
    # A segment longer than some blocks, an empty one, and short ones.
    lengths = torch.tensor([3 * SPLIT + 5, 0, 1, SPLIT, 7])
    bags = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
    offsets = (lengths.cumsum(0) - lengths).to(device)
    rows = torch.randint(9, (len(bags),), generator=generator).to(device)
    table, grads, weights, pre = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((9, 2 * COLUMNS), (len(lengths), 2 * COLUMNS), (len(bags),), (3, BLOCK))
    )
    threshold = torch.ones((), device=device)
    compacted = compact_above(pre, threshold)
    # Nine values, each of which many have; the border is one of them.
    levels = (torch.randint(9, (2 * CANDIDATES + 5,), generator=generator) + 1.0).to(device)
    numbers, count = 3 * torch.arange(len(levels)).to(device), len(levels) // 2
    largest = levels.sort(descending=True, stable=True).indices[:count].sort().values
    kept = compact_largest(numbers, levels, count)
    results = {
        "segment_sum": (
            segment_sum(table, rows, weights, offsets),
            embedding_bag(rows, table, offsets, mode="sum", per_sample_weights=weights),
        ),
        "segment_dot": (segment_dot(grads, table, rows, bags), (grads[bags] * table[rows]).sum(1)),
        "compact_above": (compacted.places, (pre > threshold).flatten().nonzero().squeeze(1)),
        "compact_above's values": (compacted.values, pre[pre > threshold]),
        "compact_largest": (kept[0], numbers[largest]),
        "compact_largest's values": (kept[1], levels[largest]),
    }
    for name, (found, expected) in results.items():
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4, atol=1e-3):
            raise RuntimeError(f"The result of {name} is not torch's.")


def _check_dtypes(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"The GPU kernels sum in float32: expected one of {DTYPES}, got {tensor.dtype}.")


@triton.jit
def _sum_places(table, rows, weights, begin, end, column, hidden_size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum (COLUMNS,) of the weighted rows of the places from begin to end."""
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(begin, end, ROWS):
        place = first + tl.arange(0, ROWS)
        row = tl.load(rows + place, mask=place < end, other=0)
        weight = tl.load(weights + place, mask=place < end, other=0).to(tl.float32)
        mask = (place < end)[:, None] & (column < hidden_size)[None, :]
        tile = tl.load(table + row[:, None] * hidden_size + column[None, :], mask=mask, other=0)
        total += tl.sum(weight[:, None] * tile.to(tl.float32), axis=0)
    return total


@triton.jit
def _block_sums(
    partials,
    table,
    rows,
    weights,
    in_one_segment,
    hidden_size,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if tl.load(in_one_segment + block):
        begin = block * SPLIT
        total = _sum_places(table, rows, weights, begin, begin + SPLIT, column, hidden_size, ROWS, COLUMNS)
        tl.store(partials + block * hidden_size + column, total, mask=column < hidden_size)


@triton.jit(do_not_specialize=["num_segments", "num_places"])
def _segment_sums(
    out,
    partials,
    table,
    rows,
    weights,
    offsets,
    num_segments,
    num_places,
    hidden_size,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(offsets + segment)
    end = tl.load(offsets + segment + 1, mask=segment + 1 < num_segments, other=num_places)
    # The complete blocks inside are first_block to last_block, or none where first_block >= last_block. In the latter
    # case these borders leave all places to the head, or to head and tail where one border of blocks lies between.
    first_block, last_block = tl.cdiv(begin, SPLIT), end // SPLIT
    head_end = tl.minimum(first_block * SPLIT, end)
    tail_begin = tl.maximum(last_block * SPLIT, head_end)
    total = _sum_places(table, rows, weights, begin, head_end, column, hidden_size, ROWS, COLUMNS)
    for first in range(first_block, last_block, ROWS):
        block = first + tl.arange(0, ROWS)
        mask = (block < last_block)[:, None] & (column < hidden_size)[None, :]
        tile = tl.load(partials + block[:, None] * hidden_size + column[None, :], mask=mask, other=0)
        total += tl.sum(tile, axis=0)
    total += _sum_places(table, rows, weights, tail_begin, end, column, hidden_size, ROWS, COLUMNS)
    tl.store(out + segment * hidden_size + column, total, mask=column < hidden_size)


@triton.jit(do_not_specialize=["num_places"])
def _dots(out, grads, table, rows, bags, num_places, hidden_size, PLACES: tl.constexpr, COLUMNS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    inside = place < num_places
    left = grads + tl.load(bags + place, mask=inside, other=0)[:, None] * hidden_size
    right = table + tl.load(rows + place, mask=inside, other=0)[:, None] * hidden_size
    total = tl.zeros([PLACES, COLUMNS], tl.float32)
    for first in range(0, hidden_size, COLUMNS):
        column = (first + tl.arange(0, COLUMNS))[None, :]
        mask = inside[:, None] & (column < hidden_size)
        product = tl.load(left + column, mask=mask, other=0).to(tl.float32)
        product *= tl.load(right + column, mask=mask, other=0).to(tl.float32)
        total += product
    tl.store(out + place, tl.sum(total, axis=1), mask=inside)


# `size` is specialized: only where it is known to be a multiple of 16, as B·F is in practice, are loads 128 bits wide.
@triton.jit
def _mark_above(words, counts, pre, threshold, size, BLOCK: tl.constexpr, WORD: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, BLOCK // WORD)
    bit = tl.arange(0, WORD)
    place = block * BLOCK + word[:, None] * WORD + bit[None, :]
    value = tl.load(pre + place, mask=place < size, other=0).to(tl.float32)
    above = ((value > tl.load(threshold).to(tl.float32)) & (place < size)).to(tl.int32)
    tl.store(words + block * (BLOCK // WORD) + word, tl.sum(above << bit[None, :], axis=1))
    tl.store(counts + block + 1, tl.sum(above))


@triton.jit
def _bits_set(word):
    """How many bits of each word (uint32) are set: in pairs, then in fours, in eights, and all."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["capacity"])
def _write_above(places, values, words, first, pre, capacity, BLOCK: tl.constexpr, WORD: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK // WORD)
    word = tl.load(words + block * (BLOCK // WORD) + index).to(tl.uint32, bitcast=True)
    in_word = _bits_set(word)
    target = tl.load(first + block) + tl.cumsum(in_word, 0) - in_word
    # Every word gives its lowest bit and loses it, until the fullest is empty: two or three times where one entry of
    # hundreds is active. Looking at every bit would cost more than reading the pre-activations.
    while tl.max(in_word, axis=0) > 0:
        rest = word & (word - 1)
        # A power of two as a float32: its exponent is the place of the bit.
        lowest = (word ^ rest).to(tl.float32)
        bit = (lowest.to(tl.int32, bitcast=True) >> 23) - 127
        place = block * BLOCK + index * WORD + bit
        mask = (in_word > 0) & (target < capacity)
        tl.store(places + target, place, mask=mask)
        tl.store(values + target, tl.load(pre + place, mask=mask), mask=mask)
        word = rest
        in_word -= 1
        target += 1


@triton.jit
def _beside_border(values, border, place, end):
    """Values at places before the end, which of them exceed the border, and which equal it (1 where they do)."""
    value = tl.load(values + place, mask=place < end, other=0).to(tl.float32)
    border = tl.load(border).to(tl.float32)
    # Not `value > border`: all exceed a border that is NaN, so that something is in every place of the result.
    above = (place < end) & ~(value <= border)
    return value, above.to(tl.int32), ((place < end) & (value == border)).to(tl.int32)


@triton.jit(do_not_specialize=["size", "span"])
def _count_largest(counts, values, border, size, span, SPANS: tl.constexpr, CANDIDATES: tl.constexpr):
    part = tl.program_id(0).to(tl.int64)
    end = tl.minimum((part + 1) * span, size)
    num_above, num_level = tl.zeros([CANDIDATES], tl.int32), tl.zeros([CANDIDATES], tl.int32)
    for first in range(part * span, end, CANDIDATES):
        _, above, level = _beside_border(values, border, first + tl.arange(0, CANDIDATES), end)
        num_above += above
        num_level += level
    tl.store(counts + part, tl.sum(num_above).to(tl.int64))
    tl.store(counts + SPANS + part, tl.sum(num_level).to(tl.int64))


@triton.jit(do_not_specialize=["size", "span", "count"])
def _write_largest(
    out_places,
    out_values,
    counts,
    places,
    values,
    border,
    size,
    span,
    count,
    SPANS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    end = tl.minimum((part + 1) * span, size)
    other = tl.arange(0, SPANS)
    above_of = tl.load(counts + other, mask=other < tl.num_programs(0), other=0)
    level_of = tl.load(counts + SPANS + other, mask=other < part, other=0)
    # How many of those that equal the border are taken, and how many of either kind lie before.
    left = tl.maximum(count - tl.sum(above_of), 0)
    above_before, level_before = tl.sum(tl.where(other < part, above_of, 0)), tl.sum(level_of)
    for first in range(part * span, end, CANDIDATES):
        place = first + tl.arange(0, CANDIDATES)
        value, above, level = _beside_border(values, border, place, end)
        rank = level_before + tl.cumsum(level, 0) - level
        target = above_before + tl.cumsum(above, 0) - above + tl.minimum(rank, left)
        mask = ((above > 0) | ((level > 0) & (rank < left))) & (target < count)
        tl.store(out_places + target, tl.load(places + place, mask=mask), mask=mask)
        tl.store(out_values + target, value, mask=mask)
        above_before += tl.sum(above)
        level_before += tl.sum(level)
