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
"""The arithmetic of a Matryoshka SAE, dense: select the active latents, decode every prefix.

These forms are short. They serve inference and the activations that are not selected by rank, and they are the
definition that the sparse path of training (`sparse_ops`) is tested against.

Shapes: B tokens, d = hidden_size, F = num_latents, G levels. Latent activations f are (B, F) with zeros where
inactive.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .selection import SINGLE_PROCESS, ProcessGroup, among_largest, sum_over

# Latent activations are binned by the upper bits of their float32 pattern: for positive numbers the pattern grows with
# the value, so 20 of the 31 bits make a histogram with a relative resolution of 1/4096 over all magnitudes.
HISTOGRAM_SHIFT = 11
HISTOGRAM_BINS = 1 << (31 - HISTOGRAM_SHIFT)


class InnerShares(NamedTuple):
    """Which share of inner levels' gradients is passed on: to the decoder and its bias, and to latent activations."""

    decoder: float = 1.0
    activations: float = 1.0


ALL_GRADIENTS = InnerShares()


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
    """W_enc (x - b_dec) + b_enc, (B, F). `b_dec=None` where the decoder bias is not subtracted.

    The difference is taken before the product: where the mean is large, half precision would lose it afterwards.
    """
    if b_dec is None:
        return torch.nn.functional.linear(x, W_enc, b_enc)
    if b_dec.requires_grad and torch.is_grad_enabled():
        # The added term is zero and carries b_dec's gradient through one vector, not through a gradient of all of x.
        b_enc = b_enc - W_enc @ (b_dec - b_dec.detach())
    return torch.nn.functional.linear(x - b_dec.detach(), W_enc, b_enc)


def select_batch_topk(pre: Tensor, k: float) -> Tensor:
    """Give latent activations (B, F): the round(k·B) largest positive pre-activations of the whole batch.

    (arXiv:2412.06410)
    """
    count = min(max(1, round(k * pre.shape[0])), pre.numel())
    values, indices = torch.relu(pre).flatten().topk(count, sorted=False)
    return torch.zeros_like(pre).flatten().scatter(0, indices, values).view_as(pre)


def select_topk(pre: Tensor, k: int) -> Tensor:
    """Latent activations (B, F): the k largest positive pre-activations of each token (arXiv:2406.04093)."""
    values, indices = torch.relu(pre).topk(min(k, pre.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, indices, values)


def select_above(pre: Tensor, threshold: Tensor) -> Tensor:
    """Latent activations (B, F): pre-activations above the threshold (F,), which is never negative.

    The threshold stays float32 beside pre-activations of lower precision: rounded to bfloat16 it would coincide with
    a whole step of values, some percent of all active latents.
    """
    return torch.where(pre > threshold, torch.relu(pre), torch.zeros_like(pre))


class ScaleGradient(torch.autograd.Function):
    """A tensor as it is, of whose gradient only a share is passed on."""

    @staticmethod
    def forward(ctx, tensor: Tensor, share: float) -> Tensor:
        """Give the same values."""
        ctx.share = share
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """Give the share of the gradient."""
        return ctx.share * grad, None


class JumpReLU(torch.autograd.Function):
    """pre · 1[pre > θ] and 1[pre > θ], with a straight-through gradient for θ (arXiv:2407.14435, section 4).

    The step's derivative is replaced by a rectangle of width `bandwidth` around the threshold.
    """

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor, bandwidth: Tensor) -> tuple[Tensor, Tensor]:
        """Compute latent activations, and which are active."""
        ctx.save_for_backward(pre, threshold, bandwidth)
        active = (pre > threshold).to(pre.dtype)
        return pre * active, active

    @staticmethod
    def backward(ctx, grad_latents: Tensor, grad_active: Tensor) -> tuple[Tensor, Tensor, None]:
        """Give the gradients of `pre` and `threshold`."""
        pre, threshold, bandwidth = ctx.saved_tensors
        near = ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype) / bandwidth
        grad_threshold = -(near * (threshold * grad_latents + grad_active)).sum_to_size(threshold.shape)
        return grad_latents * (pre > threshold), grad_threshold, None


def decode(latents: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """b_dec + f W_dec, (B, d). With a skip, `b_dec` is (B, d): what every level of a token begins with."""
    return torch.addmm(b_dec, latents, W_dec)


def decode_levels(
    latents: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    prefix_sizes: Sequence[int],
    detach: bool = False,
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> Iterator[Tensor]:
    """Each prefix's reconstruction, (B, d), from the smallest to the whole dictionary.

    Every group of latents is decoded once and added to the sum of the groups before it, so all levels together cost
    one decode. With `detach`, a level's gradient reaches only the latents that the level adds. With `ranks`, other
    processes have other latents of the same dictionary, and a size may be zero here. `b_dec` may be (B, d), as in
    `decode`.
    """
    reconstruction = b_dec.expand(latents.shape[0], -1)
    for level, (low, high) in enumerate(pairwise([0, *prefix_sizes])):
        before = reconstruction.detach() if detach and level else reconstruction
        # Under autocast the product is of half precision, and the sum stays what it was.
        reconstruction = before + sum_over(latents[:, low:high] @ W_dec[low:high], ranks)
        yield reconstruction


def decode_inner_levels(
    latents: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    prefix_sizes: Sequence[int],
    shares: InnerShares,
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> Iterator[Tensor]:
    """As `decode_levels`, but only these shares of the gradients of all levels but the last are passed on.

    x̂_l = Σ_{j<m_l} ‹f_j›_α ‹W_j›_δ + ‹b_dec›_δ for l < G, where ‹y›_s = s·y + (1 − s)·stop_gradient(y), with α the
    share of latent activations and δ that of the decoder. The last level is decoded again.
    """
    inner = ScaleGradient.apply(latents, shares.activations)
    rows, bias = (ScaleGradient.apply(tensor, shares.decoder) for tensor in (W_dec, b_dec))
    yield from list(decode_levels(inner, rows, bias, prefix_sizes, ranks=ranks))[:-1]
    *_, whole = decode_levels(latents, W_dec, b_dec, prefix_sizes, ranks=ranks)
    yield whole


def decode_dead(residual: Tensor, pre: Tensor, W_dec: Tensor, k: int, ranks: ProcessGroup = SINGLE_PROCESS) -> Tensor:
    """Mean squared error (scalar) of the residual (B, d) decoded from each token's k strongest dead latents.

    `pre` (B, n) and `W_dec` (n, d) are those of the n dead latents. The residual takes no gradient (arXiv:2406.04093,
    A.2). With `ranks`, other processes have other dead latents of the same tokens.
    """
    values, order = pre.topk(min(k, pre.shape[-1]), dim=-1, sorted=False)
    if ranks.size > 1:
        values = values * among_largest(values.detach(), k, ranks)
    latents = torch.zeros_like(pre).scatter(-1, order, torch.relu(values))
    return (residual.detach() - sum_over(latents @ W_dec, ranks)).pow(2).sum(-1).mean()


def activation_histogram(values: Tensor) -> Tensor:
    """How many of the values fall into each bin, (HISTOGRAM_BINS,) int64; those not above zero are not counted."""
    positive = values[values > 0].float()
    return torch.bincount(histogram_bin(positive), minlength=HISTOGRAM_BINS)


def histogram_bin(values: Tensor) -> Tensor:
    """The bin of each positive float32 value, int32 of the same shape."""
    return values.view(torch.int32) >> HISTOGRAM_SHIFT


def histogram_threshold(histogram: Tensor, count: float) -> Tensor:
    """The float32 value (scalar) that is exceeded by as near as may be to `count` of the values in the histogram.

    It lies one step of float32 below a bin's lower edge, because values of lower precision sit on the edges.
    """
    exceeding = histogram.flip(0).cumsum(0).flip(0)
    best = (exceeding - count).abs().argmin()
    return ((best << HISTOGRAM_SHIFT) - 1).clamp_min(0).to(torch.int32).view(torch.float32)


def count_above(histogram: Tensor, threshold: Tensor) -> Tensor:
    """How many of the values (scalar int64) exceed a threshold that `histogram_threshold` gave."""
    first = torch.where(threshold > 0, histogram_bin(threshold) + 1, 0)
    return histogram[first:].sum()
