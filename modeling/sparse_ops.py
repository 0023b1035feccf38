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
"""A Matryoshka step at about the price of one matrix product.

With k of F latents active, only the encoder's product is dense. Everything else here touches active latents: they are
found without sorting, decoded once for all levels, and their gradients are gathered, not multiplied.

1. Encode some tokens at a time and keep candidates above a threshold that a sample of the pre-activations suggests;
the
   exact selection is made among the candidates. The (tokens, num_latents) matrix never exists as a whole.
2. A segmented weighted sum of decoder rows gives each group's part of the reconstruction, (tokens, levels,
hidden_size);
   a running sum over the groups gives every level's error.
3. Backward, a running sum from the last level to the first gives the gradient that each group's latents see. All
levels
   together so cost one sparse decode and one sparse backward.

The segmented sums are torch's `embedding_bag`, and gradients of latent activations its gradient for per-sample
weights. Shapes: B tokens, d = hidden_size, F = num_latents, G levels, n active latents in all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# Pre-activations that exist at once, in numbers: on the CPU what stays near the caches, on a GPU what fills it.
CPU_CHUNK = 1 << 22
GPU_CHUNK = 1 << 29
# How many of a chunk's pre-activations are looked at to guess the threshold.
SAMPLES = 1 << 18


class ActiveLatents(NamedTuple):
    """The active latents of some tokens, ordered by token and then by latent: three tensors (n,)."""

    tokens: Tensor
    latents: Tensor
    values: Tensor

    def to_dense(self, num_tokens: int, num_latents: int) -> Tensor:
        """Latent activations (num_tokens, num_latents)."""
        dense = self.values.new_zeros(num_tokens, num_latents)
        return dense.index_put((self.tokens, self.latents), self.values)


class Levels(NamedTuple):
    """What a step asks for: `k` active latents per token on average, or of every token; the nested sizes."""

    k: float
    per_token: bool
    prefix_sizes: tuple[int, ...]
    detach: bool


def select(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: float, per_token: bool) -> ActiveLatents:
    """The active latents of activations x (B, d), from which b_dec is subtracted already where it should be.

    `per_token`: the k largest positive pre-activations of each token; otherwise the round(k·B) largest of the batch.
    Equal to `torch.topk` of the whole matrix where no two pre-activations are equal.
    """
    count = max(1, round(k * x.shape[0]))
    chunk = GPU_CHUNK if x.is_cuda else CPU_CHUNK
    chunks = range(0, x.shape[0], max(1, chunk // W_enc.shape[0]))
    found, threshold = [], None
    for start in chunks:
        pre = torch.nn.functional.linear(x[start : start + chunks.step], W_enc, b_enc)
        if per_token:
            places = _places_per_token(pre, round(k))
        else:
            if threshold is None:
                threshold = _sampled_threshold(pre, count / (x.shape[0] * W_enc.shape[0]))
            places = (pre > threshold).flatten().nonzero().squeeze(-1)
        found.append((places + start * W_enc.shape[0], pre.flatten()[places].to(x.dtype)))
    places, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not per_token:
        if places.numel() < count and threshold is not None and threshold > 0:
            places, values = _largest_by_chunks(x, W_enc, b_enc, count, chunks)
        if places.numel() > count:
            kept = values.topk(count, sorted=False).indices.sort().values
            places, values = places[kept], values[kept]
    tokens = places.div(W_enc.shape[0], rounding_mode="floor")
    return ActiveLatents(tokens, places - tokens * W_enc.shape[0], values)


def _sampled_threshold(pre: Tensor, share: float) -> Tensor:
    """A number, not below zero, that rather more than `share` of the pre-activations exceed, judged by a sample."""
    flat = pre.flatten()
    # An odd stride visits every latent, also where their number is a power of two.
    sample = flat[:: max(1, flat.numel() // SAMPLES) | 1]
    expected = sample.numel() * share
    # Five standard deviations of the sampling, and a tenth for chunks that differ.
    rank = min(sample.numel(), int(1.1 * expected + 5 * expected**0.5) + 8)
    return sample.topk(rank, sorted=True).values[-1].clamp_min(0)


def _places_per_token(pre: Tensor, k: int) -> Tensor:
    values, latents = pre.topk(min(k, pre.shape[-1]), dim=-1, sorted=False)
    latents, order = latents.sort(dim=-1)
    starts = torch.arange(pre.shape[0], device=pre.device).unsqueeze(-1) * pre.shape[-1]
    return (latents + starts)[values.gather(-1, order) > 0]


def _largest_by_chunks(x: Tensor, W_enc: Tensor, b_enc: Tensor, count: int, chunks: range) -> tuple[Tensor, Tensor]:
    """Places and values of at least the `count` largest, without a threshold: what happens when the guess was too
    high.
    """
    found = []
    for start in chunks:
        pre = torch.nn.functional.linear(x[start : start + chunks.step], W_enc, b_enc).flatten()
        places = pre.topk(min(count, pre.numel()), sorted=False).indices.sort().values
        places = places[pre[places] > 0]
        found.append((places + start * W_enc.shape[0], pre[places].to(x.dtype)))
    places, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return places, values


class LevelErrors(torch.autograd.Function):
    """Mean squared error of every level, (G,), with gradients for the activations and all weights."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        apply_b_dec: bool,
        levels: Levels,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        centred = x - b_dec
        encoded = centred if apply_b_dec else x
        active = select(encoded, W_enc, b_enc, levels.k, levels.per_token)
        sizes, num_groups = levels.prefix_sizes, len(levels.prefix_sizes)
        bags, offsets = _bags(active, sizes, x.shape[0])
        excess = embedding_bag(active.latents, W_dec, offsets, mode="sum", per_sample_weights=active.values)
        excess = excess.view(x.shape[0], num_groups, x.shape[1])
        # From here on `excess` is what each level's reconstruction has too much of, in place.
        excess[:, 0] -= centred
        for group in range(1, num_groups):
            excess[:, group] += excess[:, group - 1]
        errors = torch.stack([excess[:, group].pow(2).sum() for group in range(num_groups)]) / x.shape[0]
        ctx.save_for_backward(encoded, W_enc, W_dec, excess, bags, offsets, *active)
        ctx.apply_b_dec, ctx.detach = apply_b_dec, levels.detach
        reconstruction = x + excess[:, -1]
        ctx.mark_non_differentiable(reconstruction, *active)
        return errors, reconstruction, *active

    @staticmethod
    def backward(ctx, grad_errors: Tensor, *_):
        encoded, W_enc, W_dec, excess, bags, offsets, tokens, latents, values = ctx.saved_tensors
        num_tokens, num_groups, hidden_size = excess.shape
        # Gradient with respect to each group's part of the reconstruction: what all levels that contain it ask for.
        grads = excess * (2 / num_tokens * grad_errors).view(1, -1, 1)
        grad_x = grads.sum(1).neg_() if ctx.needs_input_grad[0] else None
        if not ctx.detach:
            for group in range(num_groups - 2, -1, -1):
                grads[:, group] += grads[:, group + 1]
        grad_b_dec = grads[:, 0].sum(0)
        grads = grads.view(-1, hidden_size)
        # The gradient of each active latent's value: its decoder row times its group's gradient.
        grad_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grads, W_dec, latents, offsets, bags, 0
        )
        grad_W_enc, grad_W_dec, grad_b_enc = _weight_gradients(
            encoded, grads, tokens, latents, values, bags, grad_values, W_enc.shape[0]
        )
        if grad_x is not None:
            first = torch.searchsorted(tokens, torch.arange(num_tokens, device=tokens.device))
            grad_x += embedding_bag(latents, W_enc, first, mode="sum", per_sample_weights=grad_values)
        if ctx.apply_b_dec:
            grad_b_dec = grad_b_dec - grad_b_enc @ W_enc
        return grad_x, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, None, None


def _bags(active: ActiveLatents, sizes: Sequence[int], num_tokens: int) -> tuple[Tensor, Tensor]:
    """The bag, token x groups + group, of each active latent, (n,), and where each bag begins, (B·G,)."""
    boundaries = torch.tensor(sizes[:-1], device=active.latents.device)
    groups = torch.bucketize(active.latents, boundaries, right=True)
    bags = active.tokens * len(sizes) + groups
    return bags, torch.searchsorted(bags, torch.arange(num_tokens * len(sizes), device=bags.device))


def _weight_gradients(
    encoded: Tensor,
    grads: Tensor,
    tokens: Tensor,
    latents: Tensor,
    values: Tensor,
    bags: Tensor,
    grad_values: Tensor,
    num_latents: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of W_enc and W_dec (F, d) and b_enc (F,): sums over each latent's active places."""
    order = latents.argsort(stable=True)
    first = torch.searchsorted(latents[order], torch.arange(num_latents, device=latents.device))
    grad_W_dec = embedding_bag(bags[order], grads, first, mode="sum", per_sample_weights=values[order])
    grad_W_enc = embedding_bag(tokens[order], encoded, first, mode="sum", per_sample_weights=grad_values[order])
    grad_b_enc = torch.zeros(num_latents, dtype=values.dtype, device=values.device)
    return grad_W_enc, grad_W_dec, grad_b_enc.index_add(0, latents, grad_values)
