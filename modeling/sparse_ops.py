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

With k of F latents active, only the encoder's product is dense. Everything else touches active latents: they are found
without sorting (`sparse_encoder`), decoded once for all levels, and their gradients are gathered, not multiplied.

1. A segmented weighted sum of decoder rows gives each group's part of the reconstruction,
   (tokens, levels, hidden_size); a running sum over the groups gives every level's error.
2. Backward, a running sum from the last level to the first gives the gradient that each group's latents see. So all
   levels together cost one sparse decode and one sparse backward.

The segmented sums are torch's `embedding_bag`, and gradients of latent activations its gradient for per-sample
weights; on CUDA, where Triton is present, both are the kernels of `triton_ops`, and the running sums those of
`triton_rows`. There, under autocast, decoder rows are read as the numbers that autocast would multiply.

Shapes: B tokens, d = hidden_size, F = num_latents, G levels, n active latents in all.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .dense_ops import InnerShares
from .devices import has_kernels
from .selection import ProcessGroup
from .sparse_encoder import ActiveLatents

# The auxiliary loss takes the dense path where a larger share of the dead latents is active: measured on two CPU cores
# at width 768, 384 of 6,144 dead ones take as long either way, and 384 of 16,384 half as long on the sparse path. On a
# GPU the arithmetic is that of `sparse_encoder.GPU_DENSE_SHARE`: dense, but for a hundred thousand dead ones and more.
CPU_DENSE_DEAD_SHARE = 1 / 16
GPU_DENSE_DEAD_SHARE = 1 / 256
# Numbers of a gradient that are summed at once where its memory is there already; they pass through the caches.
GRADIENT_BLOCK = 1 << 20


def _segment_sum(table: Tensor, rows: Tensor, weights: Tensor, begins: Tensor) -> Tensor:
    """Sums of weights[i] · table[rows[i]] over each segment, (S, d); segments begin at `begins` (S,)."""
    if has_kernels(table):
        from .triton_ops import segment_sum

        return segment_sum(table, rows, weights, begins)
    return embedding_bag(rows, table, begins, mode="sum", per_sample_weights=weights)


def _segment_dot(grads: Tensor, table: Tensor, rows: Tensor, begins: Tensor, bags: Tensor) -> Tensor:
    """⟨grads[bags[i]], table[rows[i]]⟩ for every place, (n,)."""
    if has_kernels(table):
        from .triton_ops import segment_dot

        return segment_dot(grads, table, rows, bags)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(grads, table, rows, begins, bags, 0)


def _read_often(weights: Tensor) -> Tensor:
    """Weights (R, d) whose rows kernels read many times: under autocast in its type, which halves what is read."""
    device = weights.device.type
    if torch.is_autocast_enabled(device) and has_kernels(weights):
        return weights.to(torch.get_autocast_dtype(device))
    return weights


def _level_errors(parts: Tensor, x: Tensor, base: Tensor) -> Tensor:
    """Squared errors of every level, summed over tokens, (G,).

    `parts` (B, G, d), what each group adds, becomes what each level's reconstruction has too much of.
    """
    if has_kernels(parts):
        from .triton_rows import level_errors

        return level_errors(parts, x, base)
    parts[:, 0] -= x - base
    for group in range(1, parts.shape[1]):
        parts[:, group] += parts[:, group - 1]
    return torch.stack([parts[:, group].square().sum() for group in range(parts.shape[1])])


def _level_gradients(excess: Tensor, scales: Tensor, running: bool) -> Tensor:
    """What the levels that contain a group ask of it, (B, G, d); without `running`, its own level alone."""
    if has_kernels(excess):
        from .triton_rows import level_gradients

        return level_gradients(excess, scales, running)
    grads = excess * scales.view(1, -1, 1)
    if running:
        for group in range(excess.shape[1] - 2, -1, -1):
            grads[:, group] += grads[:, group + 1]
    return grads


def dense_dead_share(device: torch.device) -> float:
    """The share of dead latents that are active in the auxiliary loss beyond which its dense path is taken."""
    return CPU_DENSE_DEAD_SHARE if device.type == "cpu" else GPU_DENSE_DEAD_SHARE


class GradientMemory:
    """Keeps the memory of large gradients from one step to the next.

    On the CPU, memory of this size comes fresh from the operating system each time, and the first touch of its pages
    costs more than the sums that go into it: of a step of 0.51 s at 16,384 latents of width 768, 0.15 s. A model with
    this as its `gradient_memory` writes gradients where the last ones lay, once `keep` was called in place of
    `zero_grad`.
    """

    def __init__(self) -> None:
        self._spare: dict[tuple[int, torch.dtype], Tensor] = {}

    def keep(self, parameters: Iterable[Tensor]) -> None:
        """Take the gradients off the parameters, and their memory for the next ones."""
        for parameter in parameters:
            if parameter.grad is not None:
                self._spare[parameter.data_ptr(), parameter.dtype] = parameter.grad
                parameter.grad = None

    def lend(self, parameter: Tensor) -> Tensor:
        """Memory for a gradient of the parameter; what it holds is of no meaning."""
        spare = self._spare.pop((parameter.data_ptr(), parameter.dtype), None)
        return torch.empty_like(parameter) if spare is None else spare


def _parameter_gradient(
    memory: GradientMemory | None, parameter: Tensor, table: Tensor, rows: Tensor, weights: Tensor, begins: Tensor
) -> Tensor:
    """Give the `_segment_sum` that is a parameter's gradient.

    Where there is lent memory, it is written there, a block of rows at a time.
    """
    if memory is None:
        return _segment_sum(table, rows, weights, begins).to(parameter.dtype)
    out = memory.lend(parameter)
    size = max(1, GRADIENT_BLOCK // parameter.shape[1])
    bounds = [*begins[::size].tolist(), len(rows)]
    for number, (part, target) in enumerate(zip(begins.split(size), out.split(size), strict=True)):
        here = slice(bounds[number], bounds[number + 1])
        target.copy_(_segment_sum(table, rows[here], weights[here], part - here.start))
    return out


class ActiveIndices(NamedTuple):
    """Where latents are active: `tokens` and `latents` (n,), ordered by token and then by latent.

    For sums over each latent, `order` (n,) sorts the places by latent, and `first` (F,) is where each latent begins in
    that order.
    """

    tokens: Tensor
    latents: Tensor
    order: Tensor
    first: Tensor


def index_active(active: ActiveLatents, num_latents: int) -> ActiveIndices:
    """The places of active latents, with what sums over latents need."""
    # Sorted as 32-bit numbers, of which a GPU has half as many digits to go through.
    order = active.latents.int().argsort(stable=True)
    every = torch.arange(num_latents, device=order.device)
    return ActiveIndices(active.tokens, active.latents, order, torch.searchsorted(active.latents[order], every))


def sum_by_latent(values: Tensor, order: Tensor, first: Tensor) -> Tensor:
    """The sum (F,) of values (n,) at each latent's places, given by `ActiveIndices`; always in the same order.

    `index_add_` adds floats in any order on CUDA, so that a run would not give the same bits twice.
    """
    ones, only_row = values.new_ones(1, 1), torch.zeros_like(order)
    return _segment_sum(ones, only_row, values[order], first).squeeze(1)


class TokenVectors(torch.autograd.Function):
    """A row of a table (V, d) for each token id (B,), whose gradient is summed in one order on every device.

    forward takes the table, the ids, and the memory for the table's gradient or None. (That of torch's own lookup may
    add a token's gradients in any order on CUDA, so that a run would not give the same bits twice.)
    """

    @staticmethod
    def forward(ctx, table: Tensor, ids: Tensor, memory: GradientMemory | None) -> Tensor:
        """Look the rows up (B, d)."""
        ctx.save_for_backward(table, ids)
        ctx.memory = memory
        return table[ids]

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Give the table's gradient."""
        table, ids = ctx.saved_tensors
        order = ids.argsort(stable=True)
        first = torch.searchsorted(ids[order], torch.arange(table.shape[0], device=ids.device))
        ones = torch.ones_like(ids, dtype=grad.dtype)
        return _parameter_gradient(ctx.memory, table, grad.contiguous(), order, ones, first), None, None


class PreActivations(torch.autograd.Function):
    """The pre-activations (n,) at some places, given their values, with the gradients of the dense encoder.

    forward takes x (B, d), W_enc, b_enc, b_dec (None where it is not subtracted), the values, the memory for W_enc's
    gradient or None, and the `ActiveIndices`.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None,
        values: Tensor,
        memory: GradientMemory | None,
        *places: Tensor,
    ) -> Tensor:
        """Compute the pre-activations (n,) at the places."""
        ctx.save_for_backward(x, W_enc, b_dec, *places)
        ctx.memory = memory
        return values.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Give the gradients of activations, weights and biases."""
        x, W_enc, b_dec, tokens, latents, order, first = ctx.saved_tensors
        encoded = x if b_dec is None else x - b_dec
        grad_W_enc = _parameter_gradient(ctx.memory, W_enc, encoded, tokens[order], grad[order], first)
        grad_b_enc = sum_by_latent(grad, order, first)
        grad_b_dec = None if b_dec is None else -(grad_b_enc @ W_enc)
        grad_x = None
        if ctx.needs_input_grad[0]:
            begins = torch.searchsorted(tokens, torch.arange(x.shape[0], device=tokens.device))
            grad_x = _segment_sum(W_enc, latents, grad, begins).to(x.dtype)
        return grad_x, grad_W_enc, grad_b_enc, grad_b_dec, *[None] * 6


class LevelErrors(torch.autograd.Function):
    """Mean squared error of every level, (G,), from latent activations (n,) at some places.

    forward takes x (B, d), which is to be reconstructed, the latent activations, W_dec, what every level begins with
    (b_dec (d,), or with a skip its own for each token (B, d)), the sizes of all levels but the last, (G - 1,), whether
    a level's gradient stays in the group that it adds, which shares of inner levels' gradients are passed on, the
    memory for W_dec's gradient or None, the processes that hold other latents of the same dictionary, and the
    `ActiveIndices`; it gives the errors, and the whole reconstruction (B, d), which takes no gradient. With other
    latents elsewhere, their part of every group's sum is added, and nothing needs to be sent backward: all processes
    know every level's error, from which each has the gradients of its own latents.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        values: Tensor,
        W_dec: Tensor,
        base: Tensor,
        inner_sizes: Tensor,
        detach: bool,
        shares: InnerShares,
        memory: GradientMemory | None,
        ranks: ProcessGroup,
        *places: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Compute the errors of the levels (G,), and the whole reconstruction (B, d)."""
        tokens, latents, *_ = places
        num_levels = len(inner_sizes) + 1
        # The bag of an active latent is token x levels + group.
        bags = tokens * num_levels + torch.bucketize(latents, inner_sizes, right=True)
        begins = torch.searchsorted(bags, torch.arange(x.shape[0] * num_levels, device=bags.device))
        table = _read_often(W_dec)
        excess = ranks.sum(_segment_sum(table, latents, values, begins).to(x.dtype))
        excess = excess.view(x.shape[0], num_levels, x.shape[1])
        errors = _level_errors(excess, x, base) / x.shape[0]
        reconstruction = x + excess[:, -1]
        ctx.save_for_backward(W_dec, table, excess, bags, begins, values, *places)
        ctx.detach, ctx.shares, ctx.memory, ctx.per_token = detach, shares, memory, base.dim() == 2
        ctx.mark_non_differentiable(reconstruction)
        return errors, reconstruction

    @staticmethod
    def backward(ctx, grad_errors: Tensor, _):
        """Give the gradients of latent activations, decoder and what levels begin with."""
        W_dec, table, excess, bags, begins, values, tokens, latents, order, first = ctx.saved_tensors
        num_tokens, _, hidden_size = excess.shape
        scales = 2 / num_tokens * grad_errors
        # Gradient with respect to each group's part of the reconstruction: what all levels that contain it ask for.
        grads = _level_gradients(excess, scales, running=not ctx.detach)
        grad_x = torch.einsum("bgd,g->bd", excess, -scales) if ctx.needs_input_grad[0] else None
        of_decoder, rows = grads, bags
        if ctx.shares.decoder == 0:
            of_decoder, rows = grads[:, -1:], tokens  # one gradient a token serves all of its latents
        elif ctx.shares.decoder < 1:
            of_decoder = _toward_whole(grads.clone(), ctx.shares.decoder)
        grad_base = of_decoder[:, 0].clone() if ctx.per_token else of_decoder[:, 0].sum(0)
        of_decoder = of_decoder.reshape(-1, hidden_size)
        grad_W_dec = _parameter_gradient(ctx.memory, W_dec, of_decoder, rows[order], values[order], first)
        # The gradient of a latent activation: its decoder row times its group's gradient.
        grads = _toward_whole(grads, ctx.shares.activations).view(-1, hidden_size)
        grad_values = _segment_dot(grads, table, latents, begins, bags).to(values.dtype)
        return grad_x, grad_values, grad_W_dec, grad_base, *[None] * 9


class Decode(torch.autograd.Function):
    """The sum of decoder rows at some places, each times its latent activation, (B, d), for a loss of any form.

    forward takes the latent activations (n,), W_dec, the number of tokens and the `ActiveIndices`.
    """

    @staticmethod
    def forward(ctx, values: Tensor, W_dec: Tensor, num_tokens: int, *places: Tensor) -> Tensor:
        """Compute the sums (B, d)."""
        tokens, latents, *_ = places
        begins = torch.searchsorted(tokens, torch.arange(num_tokens, device=tokens.device))
        ctx.save_for_backward(values, W_dec, begins, *places)
        return _segment_sum(W_dec, latents, values, begins)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Give the gradients of latent activations and decoder."""
        values, W_dec, begins, tokens, latents, order, first = ctx.saved_tensors
        grad = grad.contiguous()
        grad_W_dec = _segment_sum(grad, tokens[order], values[order].to(grad.dtype), first).to(W_dec.dtype)
        grad_values = _segment_dot(grad, W_dec, latents, begins, tokens).to(values.dtype)
        return grad_values, grad_W_dec, *[None] * 5


def _toward_whole(grads: Tensor, share: float) -> Tensor:
    """Keep a share of what inner levels ask for in groups' gradients (B, G, d), in place.

    The last group's gradient is what the whole dictionary asks for, and part of every other's.
    """
    if share < 1:
        for group in range(grads.shape[1] - 1):
            grads[:, group].lerp_(grads[:, -1], 1 - share)
    return grads
