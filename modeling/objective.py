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
"""What training minimises: which latents are active, every level's error, and the terms beside them.

The model's `forward` adds these up. They have two paths with one result: the sparse one of `sparse_ops`, which
training takes wherever few enough latents are active, and the dense one of `dense_ops`, which can be differentiated as
any module can.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_matryoshka_sae import MatryoshkaSAEConfig
from .dense_ops import (
    ALL_GRADIENTS,
    InnerShares,
    JumpReLU,
    decode_dead,
    decode_inner_levels,
    decode_levels,
    pre_activations,
    select_above,
    select_batch_topk,
    select_topk,
)
from .devices import constants, sent
from .selection import SINGLE_PROCESS, ProcessGroup, sum_over
from .sparse_encoder import ActiveLatents, select_exceeding, select_largest, select_largest_per_token
from .sparse_ops import (
    ActiveIndices,
    Decode,
    GradientMemory,
    LevelErrors,
    PreActivations,
    TokenVectors,
    dense_dead_share,
    index_active,
)
from .untrusted import SAEError


class BatchContext(NamedTuple):
    """What one part of a batch (a micro-batch, or what one process has) must know of the whole batch.

    The active latents of its tokens (None: it selects by itself), as selected from the whole batch; the whole batch's
    mean number of active latents per token (scalar) and mean squared error of every level (G,), where the loss is not
    linear in them: for `jumprelu`, and with `log_loss`. With them, the mean of the parts' gradients is the gradient of
    the whole.
    """

    active: ActiveLatents | None = None
    l0: Tensor | None = None
    level_errors: Tensor | None = None


# The bias of what is no latent: in no sum with a product does it come near zero, or beyond what bfloat16 can hold.
NEVER = -1e38
# Added to activations, in units of the standard deviation of what is reconstructed, before they are raised to a power
# below 1: the power's slope has no bound at 0, and one latent that is hardly active would outweigh all others.
POWER_FLOOR = 1e-3


def straight_through(part: Tensor, whole: Tensor | None) -> Tensor:
    """The value of the whole batch with the gradient of this part; the part itself where there is no more."""
    return part if whole is None else part + (whole - part).detach()


class ObjectiveMixin:
    """The methods of [`MatryoshkaSAE`] that make up its loss; B tokens, d = hidden_size, F = num_latents, G levels.

    Each level is to reconstruct y, (B, output_size): x itself, or, of a transcoder, the activation at its other site.
    """

    config: MatryoshkaSAEConfig
    training: bool
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None
    W_token: Tensor | None
    threshold: Tensor
    # Set by a trainer on the CPU, where fresh memory for gradients costs as much as the gradients.
    gradient_memory: GradientMemory | None = None
    # Set by a trainer whose processes each hold some of the latents: the others, and the first latent that is here.
    ranks: ProcessGroup = SINGLE_PROCESS
    first_latent: int = 0

    def _flat(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.shape[-1] != self.config.hidden_size:
            raise SAEError(
                f"Expected activations of shape (..., {self.config.hidden_size}), got {tuple(hidden_states.shape)}. "
                f"This SAE reads {self.config.site or 'a site of that width'} of "
                f"{self.config.base_model or 'its model'}."
            )
        return hidden_states.reshape(-1, self.config.hidden_size).to(self.W_enc.dtype)

    def _flat_target(self, x: Tensor, target: Tensor | None) -> Tensor:
        """What is to be reconstructed of activations x (B, d), (B, output_size)."""
        config = self.config
        if not config.is_transcoder and target is None:
            return x
        if not config.is_transcoder or target is None:
            given = "none was given" if target is None else f"a target {tuple(target.shape)} was given"
            kind = "A transcoder reconstructs a target," if config.is_transcoder else "An SAE reconstructs its input,"
            raise SAEError(
                f"{kind} and {given}: pass target, the activations at site_out, to a transcoder, and only to one."
            )
        if target.shape[-1] != config.output_size or target.numel() // config.output_size != x.shape[0]:
            raise SAEError(
                f"Expected targets of shape (..., {config.output_size}), one for each of the {x.shape[0]} "
                f"activations, got {tuple(target.shape)}. This transcoder writes "
                f"{config.site_out or 'a site of that width'} of {config.base_model or 'its model'}."
            )
        return target.reshape(-1, config.output_size).to(self.W_enc.dtype)

    def _flat_token_ids(self, token_ids: Tensor | None, num_tokens: int) -> Tensor | None:
        """The token of each of `num_tokens` activations, (B,) int64; None of an SAE that does not ask for it."""
        config, size = self.config, self.config.lookup_size
        if size is None:
            # A batch of several SAEs may hold them for another.
            return None
        if token_ids is None:
            raise SAEError(
                "This SAE adds a vector of the activation's own token to what it reconstructs "
                f"(lookup_size={size}): give token_ids, the token of each activation."
            )
        ids = token_ids.reshape(-1)
        if ids.shape[0] != num_tokens or ids.is_floating_point():
            raise SAEError(
                f"Expected token_ids, whole numbers, one for each of the {num_tokens} activations, got "
                f"{tuple(token_ids.shape)} of {str(token_ids.dtype).removeprefix('torch.')}."
            )
        # On a GPU this would be waited for, and torch says it there.
        if ids.device.type == "cpu" and num_tokens and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise SAEError(
                f"token_ids go from {int(ids.min())} to {int(ids.max())}, and this SAE knows ids below "
                f"{size}, those of {config.lookup_tokenizer or 'its tokenizer'}."
            )
        return ids.to(self.W_enc.device)

    def _base(self, x: Tensor | None, ids: Tensor | None) -> Tensor:
        """What every level of a reconstruction begins with.

        That is b_dec (d,); with a skip, or with a vector of each token, (B, d) for activations x and their token ids.
        """
        base = self.b_dec
        if self.W_skip is not None:
            assert x is not None
            base = torch.nn.functional.linear(x, self.W_skip, base)
        if self.W_token is not None:
            assert ids is not None
            base = base + TokenVectors.apply(self.W_token, ids, self.gradient_memory)
        return base

    @staticmethod
    def _batch_variance(x: Tensor) -> Tensor:
        """Total variance of activations (B, d), or their mean square where there is only one to tell from."""
        centre = x.mean(0) if x.shape[0] > 1 else torch.zeros_like(x[0])
        return (x - centre).pow(2).sum(-1).mean().clamp_min(torch.finfo(x.dtype).tiny)

    @torch.no_grad()
    def select(
        self,
        hidden_states: Tensor,
        k: float | None = None,
        variance: Tensor | float | None = None,
        ranks: ProcessGroup = SINGLE_PROCESS,
    ) -> ActiveLatents | None:
        """Select what a training step will have active, for a batch that is trained on in parts.

        Args:
            hidden_states: Activations (N, hidden_size).
            k: As in `forward`.
            variance: As in `forward`; of a transcoder it must be given.
            ranks: Processes that have as many other activations each; `batch_topk` selects from those of all.

        Returns:
            The active latents of these activations; None where they are too many for the sparse path, and each part of
            the batch may then select by itself.
        """
        x = self._flat(hidden_states)
        if variance is None and self.config.is_transcoder:
            raise SAEError("A transcoder's variance is that of what it reconstructs, so select needs it.")
        variance = self._batch_variance(x) if variance is None else variance
        return self._select(x, self.config.k if k is None else k, variance, ranks)

    @torch.no_grad()
    def count_active(self, hidden_states: Tensor, active: ActiveLatents | None) -> Tensor:
        """Count the latents of `jumprelu` that exceed their thresholds.

        Args:
            hidden_states: Activations (N, hidden_size).
            active: What `select` gave for them.

        Returns:
            Their number, a scalar.
        """
        if active is not None:
            return (active.values > self.threshold[active.latents]).sum()
        x = self._flat(hidden_states)
        return (pre_activations(x, self.W_enc, self.b_enc, self._subtracted_bias()) > self.threshold).sum()

    @torch.no_grad()
    def level_errors(
        self,
        hidden_states: Tensor,
        active: ActiveLatents | None,
        k: float,
        prefix_sizes: Sequence[int] | None,
        variance: Tensor,
        target: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> Tensor:
        """Measure the squared error of every level in a training step.

        Args:
            hidden_states: Activations (N, hidden_size).
            active: What `select` gave for them.
            k: As in `forward`, and so are the others.
            prefix_sizes: As in `forward`.
            variance: As in `forward`.
            target: As in `forward`.
            token_ids: As in `forward`.

        Returns:
            Mean squared errors (G,).
        """
        x, (sizes, _) = self._flat(hidden_states), self._levels_of_step(prefix_sizes)
        y, base = self._flat_target(x, target), self._base(x, self._flat_token_ids(token_ids, x.shape[0]))
        if active is None:
            return self._dense_errors(x, y, base, k, sizes, variance, BatchContext())[0]
        return self._sparse_errors(x, y, base, active, k, sizes, variance, BatchContext())[0]

    def reconstruct_as_trained(
        self, hidden_states: Tensor, k: float, variance: Tensor, widths: Tensor, token_ids: Tensor | None = None
    ) -> Tensor:
        """Reconstruct activations as a training step does, for a loss of its own: every weight has its gradient.

        Args:
            hidden_states: Activations (N, hidden_size); of all of them, `batch_topk` selects at once.
            k: As in `forward`.
            variance: As in `forward`.
            widths: How many of the first latents each activation is reconstructed from, (N,).
            token_ids: As in `forward`.

        Returns:
            Reconstructions (N, output_size).
        """
        x = self._flat(hidden_states)
        base = self._base(x, self._flat_token_ids(token_ids, x.shape[0]))
        active = self._select(x, k, variance)
        if active is None:
            pre = pre_activations(x, self.W_enc, self.b_enc, self._subtracted_bias())
            latents, _ = self._select_for_loss(pre, variance, k, BatchContext())
            inside = torch.arange(latents.shape[1], device=x.device) < widths[:, None]
            return base + (latents * inside) @ self.W_dec
        active = active.take(active.latents < widths[active.tokens])
        places = index_active(active, self.W_enc.shape[0])
        pre = PreActivations.apply(x, self.W_enc, self.b_enc, self._subtracted_bias(), active.values, None, *places)
        values, _ = self._activate(pre, places, x, k, variance, BatchContext())
        return base + Decode.apply(values, self.W_dec, x.shape[0], *places)

    @property
    def inner_shares(self) -> InnerShares:
        """The shares of inner levels' gradients that the configuration lets through."""
        return InnerShares(float(self.config.inner_decoder_share), float(self.config.inner_activation_share))

    def _subtracted_bias(self) -> Tensor | None:
        """What is subtracted from activations before they are encoded."""
        return self.b_dec if self.config.apply_b_dec_to_input else None

    def _select(
        self, x: Tensor, k: float, variance: Tensor | float, ranks: ProcessGroup = SINGLE_PROCESS
    ) -> ActiveLatents | None:
        """Find where latents of x (B, d) are active, or so nearly that their thresholds have a gradient.

        Gives these places and the pre-activations there; None where they are too many for the sparse path.
        """
        encoded = (x - self.b_dec).detach() if self.config.apply_b_dec_to_input else x
        activation = self.config.activation
        if self.training and activation == "batch_topk":
            count = max(1, round(k * x.shape[0] * ranks.size))
            return select_largest(encoded, self.W_enc, self.b_enc, count, ranks if ranks.size > 1 else self.ranks)
        if activation == "topk" and (self.training or self.config.inference == "topk"):
            return select_largest_per_token(encoded, self.W_enc, self.b_enc, round(k), self.ranks)
        threshold = self.threshold.detach()
        if activation == "jumprelu":
            threshold = threshold - self._bandwidth(variance, x) / 2
        elif activation == "relu":
            threshold = torch.zeros_like(threshold)
        return select_exceeding(encoded, self.W_enc, self.b_enc, threshold)

    def _sparse_errors(
        self,
        x: Tensor,
        y: Tensor,
        base: Tensor,
        active: ActiveLatents,
        k: float,
        sizes: Sequence[int],
        variance: Tensor | float,
        batch: BatchContext,
        shares: InnerShares = ALL_GRADIENTS,
        p: float = 1.0,
    ) -> tuple[Tensor, Tensor, ActiveLatents, Tensor]:
        """Compute the loss's parts on the sparse path.

        Gives mean squared errors of the levels (G,), the whole reconstruction (B, d), what is active, and the penalty.
        For `jumprelu`, some of what is active is just below its threshold and has the value 0.
        """
        places, memory = index_active(active, self.W_enc.shape[0]), self.gradient_memory
        bias = self._subtracted_bias()
        pre = PreActivations.apply(x, self.W_enc, self.b_enc, bias, active.values, memory, *places)
        values, sparsity_loss = self._activate(pre, places, x, k, variance, batch, p)
        inner_sizes = self._inner_sizes(sizes, places.latents)
        detach = self.config.detach_prefixes
        errors, reconstruction = LevelErrors.apply(
            y, values, self.W_dec, base, inner_sizes, detach, shares, memory, self.ranks, *places
        )
        values = values.detach()
        return errors, reconstruction, ActiveLatents(places.tokens, places.latents, values), sparsity_loss

    def _inner_sizes(self, sizes: Sequence[int], like: Tensor) -> Tensor:
        """The sizes of all levels but the last, (G - 1,), counted from the first latent that is here."""
        inner = [size - self.first_latent for size in sizes[:-1]]
        if self.config.prefix_sampling == "pareto":  # others in the next step
            return sent(torch.tensor(inner, dtype=like.dtype), like.device)
        return constants(inner, like)

    def _activate(
        self,
        pre: Tensor,
        places: ActiveIndices,
        x: Tensor,
        k: float,
        variance: Tensor | float,
        batch: BatchContext,
        p: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Give latent activations (n,) at some places, and the penalty, as `_select_for_loss`."""
        if self.config.activation == "jumprelu":
            threshold = self.threshold.to(pre.dtype)[places.latents]
            values, active = JumpReLU.apply(pre, threshold, self._bandwidth(variance, x))
            return values, self._l0_penalty(active.sum() / x.shape[0], k, batch)
        if self.config.activation == "relu":
            norms = self.W_dec.norm(dim=-1)[places.latents]
            if p != 1:
                return pre, self._power_penalty(pre * norms, x.shape[0], variance, p)
            total = sum_over((pre * norms).sum(), self.ranks)
            return pre, total / (x.shape[0] * self._scale(variance, x) * math.sqrt(self.config.output_size))
        return pre, pre.new_zeros(())

    def _l0_penalty(self, l0: Tensor, k: float, batch: BatchContext) -> Tensor:
        """Give the penalty (scalar) on active latents per token.

        It is relative, so that its size does not depend on k (Gemma Scope 2 uses this form).
        """
        return (straight_through(sum_over(l0, self.ranks), batch.l0) / k - 1).pow(2)

    def _power_penalty(self, values: Tensor, num_tokens: int, variance: Tensor | float, p: float) -> Tensor:
        """Give the penalty (scalar) of `relu`, Σ (f/σ)^p per token, of activations of any shape that may be zero.

        σ is the standard deviation of what is reconstructed, as in the L1 penalty, which is that of p = 1.
        """
        units = values / (self._scale(variance, values) * math.sqrt(self.config.output_size))
        powers = torch.where(values > 0, (units.clamp_min(0) + POWER_FLOOR).pow(p), 0)
        return sum_over(powers.sum(), self.ranks) / num_tokens

    @torch.no_grad()
    def sparsity_at(
        self, active: ActiveLatents | None, latents: Tensor | None, num_tokens: int, variance: Tensor | float, p: float
    ) -> Tensor:
        """Measure what the penalty of `relu` would be with another p, from what a training step gave.

        Args:
            active: Active latents, where the step took the sparse path.
            latents: Else all latent activations (N, num_latents).
            num_tokens: N.
            variance: As in `forward`.
            p: The exponent, below 1.

        Returns:
            The penalty per token, a scalar.
        """
        norms = self.W_dec.norm(dim=-1)
        if active is not None:
            return self._power_penalty(active.values * norms[active.latents], num_tokens, variance, p)
        assert latents is not None
        return self._power_penalty(latents * norms, num_tokens, variance, p)

    def _scale(self, variance: Tensor | float, like: Tensor) -> Tensor:
        """Standard deviation per dimension of what is reconstructed, which latent activations are as large as."""
        return (torch.as_tensor(variance, dtype=like.dtype, device=like.device) / self.config.output_size).sqrt()

    def _bandwidth(self, variance: Tensor | float, like: Tensor) -> Tensor:
        return self.config.jumprelu_bandwidth * self._scale(variance, like)

    def _dense_errors(
        self,
        x: Tensor,
        y: Tensor,
        base: Tensor,
        k: float,
        sizes: Sequence[int],
        variance: Tensor | float,
        batch: BatchContext,
        shares: InnerShares = ALL_GRADIENTS,
        p: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same, latent activations (B, F), and the sparsity penalty."""
        pre = pre_activations(x, self.W_enc, self.b_enc, self._subtracted_bias())
        latents, sparsity_loss = self._select_for_loss(pre, variance, k, batch, p)
        errors, reconstruction = [], y
        detach, width = self.config.detach_prefixes, latents.shape[1]
        sizes_here = [min(max(size - self.first_latent, 0), width) for size in sizes]
        levels = decode_levels(latents, self.W_dec, base, sizes_here, detach, self.ranks)
        if shares != ALL_GRADIENTS:
            levels = decode_inner_levels(latents, self.W_dec, base, sizes_here, shares, self.ranks)
        for reconstruction in levels:
            errors.append((y - reconstruction).pow(2).sum(-1).mean())
        return torch.stack(errors), reconstruction, latents, sparsity_loss

    @property
    def _num_aux_latents(self) -> int:
        return self.config.num_aux_latents or max(1, self.config.output_size // 2)

    def revives_densely(self, num_dead: int) -> bool:
        """Whether so many dead latents take the auxiliary loss's dense path, whose shapes are known beforehand."""
        return self._num_aux_latents > dense_dead_share(self.W_dec.device) * num_dead

    def _dead_error(self, x: Tensor, residual: Tensor, dead: Tensor, num_dead: int) -> Tensor:
        """Give the mean squared error (scalar) of the residual decoded from the `dead` latents (n,).

        They are `num_dead` in all processes; only their rows are multiplied. Numbers beyond the last latent stand for
        none.
        """
        rows, bias = dead.clamp_max(self.W_dec.shape[0] - 1), self._subtracted_bias()
        W_enc, W_dec, b_enc = self.W_enc[rows], self.W_dec[rows], torch.where(dead > rows, NEVER, self.b_enc[rows])
        k = self._num_aux_latents
        if self.revives_densely(num_dead):
            return decode_dead(residual, pre_activations(x, W_enc, b_enc, bias), W_dec, k, self.ranks)
        encoded = (x if bias is None else x - bias).detach()
        active = select_largest_per_token(encoded, W_enc, b_enc, k, self.ranks)
        places = index_active(active, dead.numel())
        values = PreActivations.apply(x, W_enc, b_enc, bias, active.values, None, *places)
        nothing, no_others = torch.zeros_like(self.b_dec), constants([], places.latents)
        errors, _ = LevelErrors.apply(
            residual.detach(), values, W_dec, nothing, no_others, False, ALL_GRADIENTS, None, self.ranks, *places
        )
        return errors[0]

    def _levels_of_step(self, prefix_sizes: Sequence[int] | None) -> tuple[Sequence[int], list[float]]:
        if prefix_sizes is None:
            return self.config.prefix_sizes, self.config.normalized_level_weights
        sizes = list(prefix_sizes)
        if not sizes or sizes[0] < 1 or sizes != sorted(set(sizes)) or sizes[-1] != self.config.num_latents:
            raise SAEError(
                "prefix_sizes must be positive, strictly increasing and end in "
                f"num_latents={self.config.num_latents}, got {sizes}."
            )
        return sizes, [1 / len(sizes)] * len(sizes)

    def _select_by_rank(self, pre: Tensor, k: float) -> Tensor:
        if self.config.activation == "batch_topk":
            return select_batch_topk(pre, k)
        return select_topk(pre, round(k))

    def _select_for_loss(
        self, pre: Tensor, variance: Tensor | float, k: float, batch: BatchContext, p: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Latent activations (B, F) and the sparsity penalty (scalar; zero where k is met by construction)."""
        if self.config.activation == "jumprelu":
            bandwidth = self._bandwidth(variance, pre)
            latents, active = JumpReLU.apply(pre, self.threshold.to(pre.dtype), bandwidth)
            return latents, self._l0_penalty(active.sum(-1).mean(), k, batch)
        if self.config.activation == "relu":
            latents = torch.relu(pre)
            norms = self.W_dec.norm(dim=-1)
            if p != 1:
                return latents, self._power_penalty(latents * norms, latents.shape[0], variance, p)
            scale = self._scale(variance, pre)
            total = sum_over((latents @ norms).mean(), self.ranks)
            return latents, total / (scale * math.sqrt(self.config.output_size))
        if self.config.inference == "topk":
            return select_topk(pre, round(k)), pre.new_zeros(())
        return select_above(pre, self.threshold), pre.new_zeros(())
