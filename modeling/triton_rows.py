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
"""What a training step does with whole rows on a GPU, each in one pass over memory, in Triton.

Torch has an operation for each sum, product and square root, and every one of them reads and writes all rows. None
does arithmetic worth speaking of, so the time is that of the memory they pass: here everything that is done with a row
is done while it is in registers.

- `level_errors` and `level_gradients` are the running sums over groups that `sparse_ops` makes of what groups add;
- `row_products` is what clipping and projection must know of a gradient;
- `adam_rows` is projection, clipping, Adam and normalisation of decoder rows: seven rows of memory in place of
  fourteen.

Nothing is added atomically: the same input gives the same bits on every run. Arithmetic is float32 whatever the input.
Shapes: B tokens, G levels, R rows, d = hidden_size.
"""

import torch
from torch import Tensor

try:  # Because transformers asks every reader of a checkpoint for what its code imports, except inside a `try`.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("triton_rows needs triton. Without it ask torch: see `devices.has_kernels`.") from error

# Columns of a level that one warp holds: a kilobyte of float32, loaded 128 bits a thread.
COLUMNS = 256
# Numbers of a row for each warp, 16 a thread: gradient, weight and both averages then fill half of its registers.
ROW_PER_WARP = 512
MAX_WARPS = 32
# A single warp waits for no other. Whether products and sums are fused is stated because the default changes between
# releases of Triton, and with it the last bits of a result.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


def level_errors(parts: Tensor, x: Tensor, base: Tensor) -> Tensor:
    """Squared errors of every level, summed over tokens, (G,), from what each group of latents adds.

    Args:
        parts: (B, G, d), contiguous; becomes what each level's reconstruction has too much of.
        x: What is to be reconstructed, (B, d).
        base: What every level begins with, (d,) or (B, d).
    """
    num_tokens, num_groups, hidden_size = parts.shape
    x, base = x.contiguous(), base.contiguous()
    base_stride = hidden_size if base.dim() == 2 else 0
    grid = (num_tokens, triton.cdiv(hidden_size, COLUMNS))
    squares = torch.zeros(*grid, num_groups, device=parts.device)
    if parts.numel():
        with torch.cuda.device_of(parts):
            _level_errors[grid](squares, parts, x, base, base_stride, num_groups, hidden_size, COLUMNS, **OPTIONS)
    return squares.sum((0, 1))


def level_gradients(excess: Tensor, scales: Tensor, running: bool) -> Tensor:
    """What the levels that contain each group ask of it, (B, G, d): the sum of their excess, each times its scale.

    Args:
        excess: As `level_errors` leaves it, (B, G, d), contiguous.
        scales: Of each level, (G,).
        running: False where a group is asked by its own level alone.
    """
    num_tokens, num_groups, hidden_size = excess.shape
    grads, scales = torch.empty_like(excess), scales.contiguous()
    grid = (num_tokens, triton.cdiv(hidden_size, COLUMNS))
    if excess.numel():
        with torch.cuda.device_of(excess):
            _level_gradients[grid](grads, excess, scales, running, num_groups, hidden_size, COLUMNS, **OPTIONS)
    return grads


def row_products(gradient: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of a gradient's rows, and their inner products with `rows`, both (R,); given two (R, d)."""
    gradient, rows = gradient.contiguous(), rows.contiguous()
    num_rows, hidden_size = gradient.shape
    squares, products = torch.empty(2, num_rows, device=gradient.device)
    if gradient.numel():
        block, warps = _whole_row(hidden_size)
        with torch.cuda.device_of(gradient):
            _row_products[(num_rows,)](
                squares, products, gradient, rows, hidden_size, block, **{**OPTIONS, "num_warps": warps}
            )
    return squares, products


def adam_rows(
    rows: Tensor,
    gradient: Tensor,
    average: Tensor,
    square: Tensor,
    *,
    radial: Tensor,
    divisor: Tensor,
    corrections: Tensor,
    lr: Tensor | float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Take a step of Adam with rows of norm 1, which keep it; all in place.

    The gradient's part along its row is taken out of it before anything else.

    Args:
        rows: (R, d), contiguous, as the next three.
        gradient: It stays as it is.
        average: Of gradients.
        square: Of squared gradients.
        radial: Inner product of each gradient with its row, (R,).
        divisor: What gradients are divided by, a scalar.
        corrections: What the averages are divided by because they began at zero, (2,).
        lr: The learning rate; a scalar of the same device, where it may change between replays of a CUDA graph.
        betas: How much of the averages stays.
        eps: As in Adam.
    """
    num_rows, hidden_size = rows.shape
    if not rows.numel():
        return
    block, warps = _whole_row(hidden_size)
    rate = lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float32, device=rows.device)
    tensors = (rows, gradient, average, square, radial, divisor, corrections, rate)
    # What comes to an average is subtracted here, in float64: of 1 - 0.999, float32 keeps five digits.
    shares = (1 - betas[0], betas[1], 1 - betas[1])
    with torch.cuda.device_of(rows):
        _adam_rows[(num_rows,)](*tensors, *shares, eps, hidden_size, block, **{**OPTIONS, "num_warps": warps})


def check_kernels(device: torch.device) -> None:
    """Launch every kernel once, in the form that training does, and compare what comes out with torch.

    Raises `RuntimeError` where they differ, and whatever Triton raises where it cannot compile or launch.
    """
    generator = torch.Generator().manual_seed(0)
    parts, x, base, gradient, rows = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((3, 2, 2 * COLUMNS), (3, 2 * COLUMNS), (2 * COLUMNS,), (5, 2 * COLUMNS), (5, 2 * COLUMNS))
    )
    rows /= rows.norm(dim=1, keepdim=True)
    excess = parts.cumsum(1) + (base - x)[:, None]
    found = level_errors(parts, x, base)
    scales = torch.tensor([0.5, 2.0]).to(device)
    scaled = excess * scales[:, None]
    products = row_products(gradient, rows)
    results = {
        "level_errors": (found, excess.square().sum((0, 2))),
        "level_errors's excess": (parts, excess),
        "level_gradients": (level_gradients(excess, scales, True), scaled.flip(1).cumsum(1).flip(1)),
        "row_products": (torch.stack(products), torch.stack([gradient.square().sum(1), (gradient * rows).sum(1)])),
        "adam_rows": _first_step(rows.clone(), gradient, products[1]),
    }
    for name, (found, expected) in results.items():
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4, atol=1e-3):
            raise RuntimeError(f"The result of {name} is not torch's.")


def _first_step(rows: Tensor, gradient: Tensor, radial: Tensor) -> tuple[Tensor, Tensor]:
    """Rows after a first step of Adam, by `adam_rows`, and as they should be."""
    lr, betas, eps = 0.1, (0.5, 0.75), 1e-8
    projected = (gradient - radial[:, None] * rows) / 2
    expected = rows - lr * projected / (projected.abs() + eps)
    average, square = torch.zeros_like(rows), torch.zeros_like(rows)
    corrections = torch.tensor([0.5, 0.25]).to(rows.device)
    divisor = torch.full((), 2.0).to(rows.device)
    options = {"radial": radial, "divisor": divisor, "corrections": corrections}
    adam_rows(rows, gradient, average, square, **options, lr=lr, betas=betas, eps=eps)
    return rows, expected / expected.norm(dim=1, keepdim=True)


def _whole_row(hidden_size: int) -> tuple[int, int]:
    """Numbers of a tile that holds a row, and warps for it."""
    block = triton.next_power_of_2(hidden_size)
    return block, min(MAX_WARPS, max(1, block // ROW_PER_WARP))


@triton.jit
def _level_errors(squares, parts, x, base, base_stride, num_groups, hidden_size, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden_size
    level = tl.load(base + token * base_stride + column, mask=inside, other=0).to(tl.float32)
    level -= tl.load(x + token * hidden_size + column, mask=inside, other=0).to(tl.float32)
    out = squares + (token * tl.num_programs(1) + tl.program_id(1)) * num_groups
    for group in range(0, num_groups):
        place = parts + (token * num_groups + group) * hidden_size + column
        level += tl.load(place, mask=inside, other=0).to(tl.float32)
        tl.store(place, level, mask=inside)
        tl.store(out + group, tl.sum(level * level))


@triton.jit(do_not_specialize=["running"])
def _level_gradients(grads, excess, scales, running, num_groups, hidden_size, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden_size
    total = tl.zeros([COLUMNS], tl.float32)
    for after in range(0, num_groups):
        group = num_groups - 1 - after
        place = (token * num_groups + group) * hidden_size + column
        own = tl.load(scales + group).to(tl.float32) * tl.load(excess + place, mask=inside, other=0).to(tl.float32)
        total = tl.where(running, total + own, own)
        tl.store(grads + place, total, mask=inside)


@triton.jit
def _row_products(squares, products, gradient, rows, hidden_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden_size
    mine = tl.load(gradient + row * hidden_size + column, mask=inside, other=0).to(tl.float32)
    other = tl.load(rows + row * hidden_size + column, mask=inside, other=0).to(tl.float32)
    tl.store(squares + row, tl.sum(mine * mine))
    tl.store(products + row, tl.sum(mine * other))


@triton.jit(do_not_specialize=["fresh1", "beta2", "fresh2", "eps"])
def _adam_rows(
    rows,
    gradient,
    average,
    square,
    radial,
    divisor,
    corrections,
    rate,
    fresh1,
    beta2,
    fresh2,
    eps,
    hidden_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden_size
    place = row * hidden_size + column
    old = tl.load(rows + place, mask=inside, other=0).to(tl.float32)
    slope = tl.load(gradient + place, mask=inside, other=0).to(tl.float32)
    slope = (slope - tl.load(radial + row) * old) / tl.load(divisor)
    first = tl.load(average + place, mask=inside, other=0).to(tl.float32)
    first += fresh1 * (slope - first)
    second = tl.load(square + place, mask=inside, other=0).to(tl.float32)
    second = beta2 * second + fresh2 * slope * slope
    tl.store(average + place, first, mask=inside)
    tl.store(square + place, second, mask=inside)
    size = tl.load(rate) / tl.load(corrections)
    new = old - size * first / (tl.sqrt(second / tl.load(corrections + 1)) + eps)
    new = tl.where(inside, new, 0)
    tl.store(rows + place, new / tl.sqrt(tl.sum(new * new)), mask=inside)
