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
"""The Matryoshka sparse autoencoder: nested dictionaries of a language model's activations.

One encoder and one decoder serve every level. The latents are selected once over the whole dictionary; the first m of
them must then reconstruct the activation alone, for each m of `config.prefix_sizes` (Bussmann, Nabeshima, Karvonen,
Nanda: "Learning Multi-Level Features with Matryoshka Sparse Autoencoders", arXiv:2503.17547). Early latents so come to
hold general concepts and later ones refine them.

`W_enc` and `W_dec` are both stored as (num_latents, hidden_size), so that a prefix is the first rows, contiguous on
disk.

A transcoder is the same with another target: it reads an activation at one site, such as an MLP's input, and its
levels reconstruct that of another, such as the MLP's output (arXiv:2406.11944), by choice beside a linear map of what
it reads. A tokenized SAE adds a learnt vector of the activation's own token to every level (arXiv:2502.17332).
"""

# The branches below are training objectives that a user chooses between, not the variants of released checkpoints.
# trf-ignore: TRF041 activation, inference, apply_b_dec_to_input, skip, is_transcoder, log_loss, aux_loss_weight

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_matryoshka_sae import MatryoshkaSAEConfig
from .dense_ops import (
    HISTOGRAM_BINS,
    InnerShares,
    activation_histogram,
    count_above,
    decode,
    decode_levels,
    histogram_threshold,
    pre_activations,
    select_above,
    select_topk,
)
from .devices import constants
from .objective import BatchContext, ObjectiveMixin, straight_through
from .prefix_loading import HUB_ARGUMENTS, pin_commit, read_state, truncate_state
from .selection import SINGLE_PROCESS, ProcessGroup
from .sharing import SharingMixin
from .sparse_encoder import ActiveLatents, tokens_at_once
from .untrusted import SAEError, check_shapes, check_values, inside

MIN_THRESHOLD = 1e-20
# Copies of a token's latents that calibrating and measuring make on the way.
MEASURED_COPIES = 4


# trf-ignore: TRF057 (these docstrings are written by hand: they must read the same where the file is remote code)
@dataclass
class MatryoshkaSAEOutput(ModelOutput):
    r"""Output of [`MatryoshkaSAE`].

    loss (`torch.Tensor`, scalar):
        The levels' weighted squared errors over the variance of the activations, plus the auxiliary and sparsity
        terms.
    reconstruction (`torch.Tensor` of shape `(..., output_size)`):
        Reconstruction by the whole dictionary.
    latents (`torch.Tensor` of shape `(..., num_latents)`):
        Latent activations, zero where inactive.
    level_losses (`torch.Tensor` of shape `(num_levels,)`):
        Squared error of each prefix over the variance of the activations, before weights.
    aux_loss (`torch.Tensor`, scalar):
        The dead latents' squared error over the variance, before its weight.
    sparsity_loss (`torch.Tensor`, scalar):
        The penalty of `relu` and `jumprelu`, before its weight.
    active (`ActiveLatents`):
        The same latents as places and values, from a training step of `batch_topk` or `topk`. There, neither latents
        nor reconstruction carry a gradient; use `encode` and `decode` for a loss of your own.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    level_losses: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    sparsity_loss: torch.Tensor | None = None
    active: ActiveLatents | None = None


# trf-ignore: TRF057 (as above)
class MatryoshkaSAEPreTrainedModel(PreTrainedModel):
    """What transformers needs to load, save and initialise a [`MatryoshkaSAE`]."""

    config: MatryoshkaSAEConfig
    base_model_prefix = "sae"
    main_input_name = "hidden_states"
    _keep_in_fp32_modules_strict = ["threshold", "max_activation", "firing_rate"]

    @torch.no_grad()
    def _init_weights(self, module):
        """Random unit decoder rows, the encoder their transpose: what the trainer starts from before it sees data."""
        super()._init_weights(module)
        if isinstance(module, MatryoshkaSAE):
            init.normal_(module.W_dec)
            init.copy_(module.W_dec, nn.functional.normalize(module.W_dec, dim=-1))
            if module.config.is_transcoder:
                init.normal_(module.W_enc)
                init.copy_(module.W_enc, nn.functional.normalize(module.W_enc, dim=-1))
            else:
                init.copy_(module.W_enc, module.W_dec)
            for tensor in (module.b_enc, module.b_dec, module.threshold, module.max_activation, module.firing_rate):
                init.zeros_(tensor)
            if module.W_skip is not None:
                init.zeros_(module.W_skip)
            if module.W_token is not None:
                init.zeros_(module.W_token)


# `push_to_hub` publishes one thing with a card, so it takes less than what it stands in for.
class MatryoshkaSAE(SharingMixin, ObjectiveMixin, MatryoshkaSAEPreTrainedModel):  # type: ignore[misc]
    """A sparse autoencoder whose every prefix of latents is one too.

    As in any module, `train()` and `eval()` choose the behaviour: in training mode `batch_topk` and `topk` select by
    rank, and in evaluation mode all activations but `relu` keep what exceeds `threshold`, so that a token's latents
    depend neither on its batch nor on later latents. `threshold` is zero until a training run, or
    [`MatryoshkaSAE.calibrate_threshold`], has set it. (`config.inference="topk"` ranks in evaluation mode too.)

    Besides the weights, a checkpoint holds `max_activation` and `firing_rate` per latent, (num_latents,): the units in
    which people steer, and how rare a latent is.
    """

    def __init__(self, config: MatryoshkaSAEConfig):
        super().__init__(config)
        num_latents, hidden_size, output_size = config.num_latents, config.hidden_size, config.output_size
        self.W_enc = nn.Parameter(torch.empty(num_latents, hidden_size))
        self.b_enc = nn.Parameter(torch.empty(num_latents))
        self.W_dec = nn.Parameter(torch.empty(num_latents, output_size))
        self.b_dec = nn.Parameter(torch.empty(output_size))
        self.W_skip = nn.Parameter(torch.empty(output_size, hidden_size)) if config.skip else None
        lookup_size = config.lookup_size
        self.W_token = None if lookup_size is None else nn.Parameter(torch.empty(lookup_size, output_size))
        threshold = torch.empty(num_latents, dtype=torch.float32)
        self.threshold = nn.Parameter(threshold) if config.activation == "jumprelu" else nn.Buffer(threshold)
        self.max_activation = nn.Buffer(torch.empty(num_latents, dtype=torch.float32))
        self.firing_rate = nn.Buffer(torch.empty(num_latents, dtype=torch.float32))
        self.post_init()

    # Inference

    def pre_activations(self, hidden_states: Tensor, prefix: int | None = None) -> Tensor:
        """Compute pre-activations.

        Args:
            hidden_states: Activations (..., hidden_size).
            prefix: Only the first latents; all by default.

        Returns:
            Pre-activations (..., prefix).
        """
        x = self._flat(hidden_states)
        m = self._checked_prefix(prefix)
        pre = pre_activations(x, self.W_enc[:m], self.b_enc[:m], self._subtracted_bias())
        return pre.view(*hidden_states.shape[:-1], pre.shape[-1])

    def encode(self, hidden_states: Tensor, prefix: int | None = None) -> Tensor:
        """Compute latent activations.

        In evaluation mode the first `prefix` latents cost only their own rows.

        Args:
            hidden_states: Activations (..., hidden_size).
            prefix: Only the first latents; all by default.

        Returns:
            Latent activations (..., num_latents), or (..., prefix); zero where inactive.

        Raises:
            ValueError: Activations of another width, or a prefix that is none.
        """
        if self.training and self.config.activation in ("batch_topk", "topk"):
            pre = self.pre_activations(hidden_states)
            latents = self._select_by_rank(pre.reshape(-1, pre.shape[-1]), self.config.k).view_as(pre)
            return latents[..., : self._checked_prefix(prefix)]
        pre = self.pre_activations(hidden_states, prefix)
        if self.config.inference == "topk":
            return select_topk(pre.reshape(-1, pre.shape[-1]), round(self.config.k)).view_as(pre)
        return select_above(pre, self.threshold[: pre.shape[-1]])

    def decode(
        self,
        latents: Tensor,
        prefix: int | None = None,
        hidden_states: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> Tensor:
        """Reconstruct activations from the first latents.

        Args:
            latents: Latent activations (..., m) for any m up to num_latents: what `encode` gave, or its first columns.
            prefix: Only the first latents; all that are given by default.
            hidden_states: What was encoded, (..., hidden_size): a transcoder with a skip needs it.
            token_ids: The token of each activation, (...,) int64: a tokenized SAE needs them.

        Returns:
            Reconstruction (..., output_size).

        Raises:
            ValueError: More columns than latents, a prefix that is none, a skip without what it maps, or token ids
                that are missing or beyond the tokenizer's.
        """
        width = latents.shape[-1]
        if width > self.config.num_latents:
            raise SAEError(f"latents must have at most num_latents={self.config.num_latents} columns, got {width}.")
        m = min(self._checked_prefix(prefix), width)
        flat = latents[..., :m].reshape(-1, m)
        base = self._decoder_base(hidden_states, token_ids, flat.shape[0])
        return decode(flat, self.W_dec[:m], base).view(*latents.shape[:-1], self.config.output_size)

    def _decoder_base(self, hidden_states: Tensor | None, token_ids: Tensor | None, num_tokens: int) -> Tensor:
        if self.W_skip is not None and hidden_states is None:
            raise SAEError(
                "This transcoder has a skip, which maps what was encoded to a part of the reconstruction: give that "
                "as hidden_states, beside the latents."
            )
        x = None if self.W_skip is None or hidden_states is None else self._flat(hidden_states)
        return self._base(x, self._flat_token_ids(token_ids, num_tokens))

    def decode_levels(
        self, latents: Tensor, hidden_states: Tensor | None = None, token_ids: Tensor | None = None
    ) -> Tensor:
        """Reconstruct activations by every prefix of `config.prefix_sizes`.

        Args:
            latents: Latent activations (..., num_latents).
            hidden_states: As in `decode`.
            token_ids: As in `decode`.

        Returns:
            Reconstructions (num_levels, ..., output_size).

        Raises:
            ValueError: Not all latents are given, or not what a skip or a tokenized SAE needs.
        """
        num_latents = self.config.num_latents
        if latents.shape[-1] != num_latents:
            raise SAEError(f"Every level needs all latents, (..., {num_latents}), got {tuple(latents.shape)}.")
        flat = latents.reshape(-1, num_latents)
        base = self._decoder_base(hidden_states, token_ids, flat.shape[0])
        levels = list(decode_levels(flat, self.W_dec, base, self.config.prefix_sizes))
        return torch.stack(levels).view(len(levels), *latents.shape[:-1], self.config.output_size)

    def in_parts(self, hidden_states: Tensor) -> Iterator[Tensor]:
        """Cut activations into pieces of so few tokens that their latents are no burden.

        Args:
            hidden_states: Activations (..., hidden_size).

        Yields:
            Activations (n, hidden_size), in their order.
        """
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        yield from flat.split(tokens_at_once(MEASURED_COPIES * self.config.num_latents, self.device))

    def reconstruct_levels(self, hidden_states: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Reconstruct activations by every prefix, without all tokens' latents at once.

        Args:
            hidden_states: Activations (..., hidden_size).
            token_ids: As in `decode`.

        Returns:
            Reconstructions (num_levels, ..., output_size): those of `encode` and `decode_levels` one after the other.
        """
        parts, begin = [], 0
        ids = self._flat_token_ids(token_ids, hidden_states[..., 0].numel())
        for part in self.in_parts(hidden_states):
            own = None if ids is None else ids[begin : begin + len(part)]
            parts.append(self.decode_levels(self.encode(part), part, own))
            begin += len(part)
        return torch.cat(parts, dim=1).view(-1, *hidden_states.shape[:-1], self.config.output_size)

    # Training

    # trf-ignore: TRF057 (as above)
    def forward(
        self,
        hidden_states: Tensor,
        dead_latents: Tensor | None = None,
        prefix_sizes: Sequence[int] | None = None,
        variance: Tensor | float | None = None,
        k: float | None = None,
        sparsity_weight: Tensor | float | None = None,
        return_latents: bool = True,
        batch: BatchContext | None = None,
        inner_shares: InnerShares | None = None,
        target: Tensor | None = None,
        sparsity_p: float | None = None,
        token_ids: Tensor | None = None,
    ) -> MatryoshkaSAEOutput:
        """Reconstruct activations at every level and give the loss.

        Args:
            hidden_states: Activations (..., hidden_size).
            dead_latents: Latents to revive through the auxiliary loss, a mask (num_latents,) or their numbers, int64,
                of any length and filled up with `num_latents`; none by default.
            prefix_sizes: Levels of this step in place of `config.prefix_sizes`, with equal weights (Pareto sampling).
            variance: Total variance of what is reconstructed, E‖y − E y‖², by which losses are divided; of this batch
                by default.
            k: Active latents per token of this step in place of `config.k` (annealing).
            sparsity_weight: Weight of the penalty of this step in place of `config.sparsity_weight` (L0 controller).
            return_latents: Whether to give `latents`, which a training step of `batch_topk` and `topk` does not need.
            batch: Where these activations are a part of a batch only, what it must know of the whole (see `select`).
            inner_shares: Shares of inner levels' gradients of this step in place of the configuration's (schedule).
            target: What a transcoder is to reconstruct, the activations at its `site_out`, (..., output_size); of an
                SAE that is `hidden_states`.
            sparsity_p: The p of the penalty of `relu` of this step in place of `config.p_end` (annealing).
            token_ids: The token of each activation, (...,) int64, of a tokenized SAE; others do not look at them.

        Returns:
            The loss and what it is made of.

        Raises:
            ValueError: Activations of another width, or levels that are none.
        """
        x = self._flat(hidden_states)
        y, base = self._flat_target(x, target), self._base(x, self._flat_token_ids(token_ids, x.shape[0]))
        if variance is None:
            variance = self._batch_variance(y)
        k = self.config.k if k is None else k
        sizes, weights = self._levels_of_step(prefix_sizes)
        # Outside training, outputs can be differentiated as those of any module; only the dense path offers that.
        batch = batch or BatchContext()
        shares = self.inner_shares if inner_shares is None else inner_shares
        p = float(self.config.p_end if sparsity_p is None else sparsity_p)
        active = batch.active
        if active is None and (self.training or not torch.is_grad_enabled()):
            active = self._select(x, k, variance)
        latents: Tensor | None
        if active is None:
            errors, reconstruction, latents, sparsity_loss = self._dense_errors(
                x, y, base, k, sizes, variance, batch, shares, p
            )
        else:
            errors, reconstruction, active, sparsity_loss = self._sparse_errors(
                x, y, base, active, k, sizes, variance, batch, shares, p
            )
            if return_latents:
                latents = active.to_dense(x.shape[0], self.config.num_latents)
                active = active.take(active.values > 0) if self.config.activation == "jumprelu" else active
            else:
                latents = None
        level_losses = errors / variance
        losses = level_losses
        if self.config.log_loss:
            losses = (straight_through(errors, batch.level_errors) / variance).log()
        sparsity_weight = self.config.sparsity_weight if sparsity_weight is None else sparsity_weight
        loss = (losses * constants(weights, losses)).sum() + sparsity_weight * sparsity_loss

        aux_loss = loss.new_zeros(())
        if dead_latents is not None and self.config.aux_loss_weight:
            dead = dead_latents.nonzero().squeeze(-1) if dead_latents.dtype == torch.bool else dead_latents
            num_dead = self.ranks.total(dead.numel())
            if num_dead:
                aux_loss = self._dead_error(x, y - reconstruction, dead, num_dead) / variance
                loss = loss + self.config.aux_loss_weight * aux_loss
        return MatryoshkaSAEOutput(
            loss=loss,
            reconstruction=reconstruction.view(*hidden_states.shape[:-1], self.config.output_size),
            latents=None if latents is None else latents.view(*hidden_states.shape[:-1], -1),
            level_losses=level_losses.detach(),
            aux_loss=aux_loss.detach(),
            sparsity_loss=sparsity_loss.detach(),
            active=active,
        )

    @torch.no_grad()
    def calibrate_threshold(self, batches: Iterable[Tensor], ranks: ProcessGroup = SINGLE_PROCESS) -> float:
        """Set the inference threshold so that on these activations, mean L0 is `config.k`.

        `batch_topk` and `topk` get one threshold for the dictionary; `jumprelu` has its learnt thresholds scaled by
        one factor; `relu` has none and stays as it is.

        Args:
            batches: Activations, tensors (..., hidden_size).
            ranks: Processes that give other activations each (some may give none), and all come to the same threshold.

        Returns:
            The L0 that results, active latents per token.

        Raises:
            ValueError: There are no activations.
        """
        scaled = self.config.activation == "jumprelu"
        # A threshold that is still zero could not be scaled.
        units = self.threshold.clamp_min(MIN_THRESHOLD)
        histogram = torch.zeros(HISTOGRAM_BINS, dtype=torch.int64, device=self.device)
        num_tokens = 0
        for part in chain.from_iterable(map(self.in_parts, batches)):
            pre = self.pre_activations(part)
            num_tokens += pre.shape[0]
            histogram = histogram + activation_histogram(pre / units if scaled else pre)
        # Alone with the latents, the others have other tokens; alone with the tokens, other latents.
        num_tokens, histogram = ranks.total(num_tokens), self.ranks.sum(ranks.sum(histogram))
        if num_tokens == 0:
            raise SAEError("calibrate_threshold got no activations; give tensors of shape (..., hidden_size).")
        if self.config.activation == "relu":
            return int(histogram.sum()) / num_tokens
        value = histogram_threshold(histogram, self.config.k * num_tokens)
        self.threshold.copy_(units * value if scaled else value)
        return int(count_above(histogram, value)) / num_tokens

    # Prefixes and files

    def truncate(self, prefix: int) -> "MatryoshkaSAE":
        """Make a model of the first latents; what it computes equals this model's prefix exactly.

        Args:
            prefix: How many latents.

        Returns:
            The smaller SAE, with memory of its own.

        Raises:
            ValueError: The prefix is none.
        """
        state = truncate_state(self.state_dict(), prefix)
        with torch.device("meta"):
            model = type(self)(self.config.truncated(prefix))
        # Assigned rather than copied, so that each tensor keeps its own precision and device.
        model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        return model.train(self.training)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, prefix: int | None = None, output_loading_info=False, **kwargs
    ):
        """Load an SAE as any model of transformers, with three differences.

        Weights that are missing, unexpected, of another shape, not finite or not floating-point numbers are refused,
        before more memory is taken than the file has. A prefix alone can be read. And where hf_msae is installed,
        checkpoints of other libraries are recognised and converted. Weights are read from safetensors only, never from
        a pickle.

        Args:
            pretrained_model_name_or_path: A folder, or a repo of the Hub.
            model_args: As in transformers.
            prefix: Read only the first rows of the file, from disk or over the network; the model is what `truncate`
                of the whole would be.
            output_loading_info: As in transformers.
            kwargs: As in transformers, among them `subfolder`, `revision` and `dtype`; fields of the configuration;
                and for another library's checkpoint `prefix_sizes`, where its files do not say them.

        Returns:
            The SAE in evaluation mode; with `output_loading_info`, a pair of it and a dictionary.

        Raises:
            ValueError: The files are not those of an SAE, or damaged.
            OSError: They are not there, or cannot be reached.
        """
        source = pretrained_model_name_or_path
        if source is not None and "state_dict" not in kwargs:
            config, state = cls._read(source, prefix, kwargs)
            kwargs = {"dtype": config.dtype or state["W_dec"].dtype, **kwargs, "config": config, "state_dict": state}
            del state
            given = None
        else:
            given = source
        if kwargs.get("config") is not None and kwargs.get("state_dict") is not None:
            where = "the state_dict" if source is None else str(source)
            _check_weights(kwargs["state_dict"], kwargs["config"], where)
        with cls.loading:
            loaded: Any = super().from_pretrained(given, *model_args, **kwargs, output_loading_info=True)
        model, info = loaded
        model.config.name_or_path = str(source)
        kwargs.clear()
        # Weights that were not converted lie inside the mapped file, where they begin anywhere, and a product of
        # matrices sums in an order that depends on where they begin. Copies begin where all new tensors do: so a
        # prefix equals the whole, and a loaded model the saved one, to the last bit, whatever becomes of the file.
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()
        return (model, info) if output_loading_info else model

    @classmethod
    def _read(
        cls, source: str | Path, prefix: int | None, kwargs: dict
    ) -> tuple[MatryoshkaSAEConfig, dict[str, Tensor]]:
        """Read configuration and weights of a checkpoint of ours or of another library.

        Takes the arguments that it used out of `kwargs`.
        """
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        if hub.get("subfolder"):
            hub["subfolder"] = inside(hub["subfolder"])
        config = kwargs.pop("config", None)
        if cls.formats_module is not None and config is None:
            converted = cls._imported(cls.formats_module).read_library_checkpoint(
                source, kwargs.get("prefix_sizes"), **hub
            )
            if converted is not None:
                kwargs.pop("prefix_sizes", None)
                config, state = converted
                return (config, state) if prefix is None else (config.truncated(prefix), truncate_state(state, prefix))
            hub = pin_commit(source, hub)
        # Remote code's configuration may be of another copy of these files than its model is.
        if not isinstance(config, PreTrainedConfig):
            names = {field.name for field in fields(MatryoshkaSAEConfig)} - {"dtype"}
            changes = {name: kwargs.pop(name) for name in names & kwargs.keys()}
            config = MatryoshkaSAEConfig.from_pretrained(config or source, **hub, **changes)
        part = config if prefix is None else config.truncated(prefix)
        return part, read_state(source, config, prefix, **hub)

    def _checked_prefix(self, prefix: int | None) -> int:
        if prefix is None:
            return self.config.num_latents
        if not 1 <= prefix <= self.config.num_latents:
            raise SAEError(f"prefix must be from 1 to num_latents={self.config.num_latents}, got {prefix}.")
        return prefix


def _check_weights(state: Mapping[str, Tensor], config: MatryoshkaSAEConfig, where: str) -> None:
    """Raises `ValueError` for weights that are not those of this configuration, or not numbers to compute with."""
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, config.weight_shapes, where)
    check_values(state, where)


__all__ = ["MatryoshkaSAE", "MatryoshkaSAEOutput", "MatryoshkaSAEPreTrainedModel"]
