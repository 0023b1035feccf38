"""Data that no SAE is trained on, some to set inference thresholds with and some to measure on, and how that is done.

The two are kept apart, so that the L0 that is reported is that of a threshold which never saw those tokens.

In training `batch_topk` and `topk` select by rank; a reader selects by threshold. So whatever is saved, measured or
shown to callbacks as such is first calibrated on held-out activations. In the middle of training the learner gets its
own threshold back afterwards; at the end the SAE stays as it was measured.

Several processes share the held-out tokens, or, where each has some of the latents, go through all of them together;
the numbers come out the same. Cross-entropy alone is left to the main process where it has the whole SAE.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data import (
    CachedActivations,
    Documents,
    Window,
    collate,
    find_norm_limits,
    harvest,
    hold_out,
    pad_id,
    split_of,
    vocabulary,
)
from hf_msae.errors import InputError
from hf_msae.metrics import (
    Measurement,
    ReconstructionMeter,
    TokenBatch,
    measure_cross_entropy,
    measured_facts,
    merge,
    predicts_next_token,
)
from hf_msae.outliers import within_limit
from hf_msae.sites import Site
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.learner import Learner
from hf_msae.training.sharded import ShardedSAE


class HeldOut(ABC):
    """Held-out activations, given anew in every pass.

    together: whether all processes must ask for the same at the same time, because they run one language model.
    facts: how it was chosen, JSON-able.
    """

    together: bool = False
    facts: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def calibration(self, rank: int = 0, world_size: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        """One process's share of the activations for setting thresholds."""

    @abstractmethod
    def evaluation(self, rank: int = 0, world_size: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        """One process's share of the activations for measuring."""

    @abstractmethod
    def find_norm_limits(self, multiple: float | None) -> dict[Site, float | None]:
        """At each site the norm beyond which activations are outliers, 0 for none, None where it is not known."""

    @abstractmethod
    def token_batches(self) -> Iterator[TokenBatch]:
        """Token batches for measuring cross-entropy, `args.ce_tokens` in all; none where there is no text."""


class HeldOutText(HeldOut):
    """Documents that a hash of their contents chose, through the language model whenever they are needed.

    `together`: the language model is one copy that all processes run, so each goes through all windows, and keeps its
    share of the activations. `split` is what training must leave out, where it reads the same documents; `facts` what
    metrics.json says of them. Raises `DatasetError` where the dataset has too few tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sites: Sequence[Site],
        documents: Documents,
        args: SAETrainingArguments,
        context_length: int,
        together: bool = False,
    ) -> None:
        self.model, self.sites, self.args, self.together = model, sites, args, together
        vocab_size = vocabulary(model)
        self.pad_id = pad_id(tokenizer, vocab_size)
        common = (documents, tokenizer, context_length)
        measuring = hold_out(*common, args.eval_tokens, args.packing, vocab_size=vocab_size)
        calibration = hold_out(
            *common, args.calibration_tokens, args.packing, purpose="calibration", vocab_size=vocab_size
        )
        self.split = split_of(measuring, calibration, documents)
        self.facts = {"measuring": measuring.facts(), "calibration": calibration.facts()}
        self._evaluation, self._calibration = measuring.windows, calibration.windows

    def calibration(self, rank: int = 0, world_size: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        return self._harvest(self._calibration, rank, world_size)

    def evaluation(self, rank: int = 0, world_size: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        return self._harvest(self._evaluation, rank, world_size)

    def _harvest(self, windows: Sequence[Window], rank: int, world_size: int) -> Iterator[Mapping[Site, Tensor]]:
        options = {"lm_batch_size": self.args.lm_batch_size, "pad_id": self.pad_id}
        if self.together:
            yield from islice(harvest(self.model, self.sites, windows, **options), rank, None, world_size)
        else:
            yield from harvest(self.model, self.sites, windows[rank::world_size], **options)

    def find_norm_limits(self, multiple: float | None) -> dict[Site, float | None]:
        found = find_norm_limits(
            self.model,
            self.sites,
            self._evaluation,
            multiple=multiple,
            lm_batch_size=self.args.lm_batch_size,
            pad_id=self.pad_id,
        )
        return {**found}

    def token_batches(self) -> Iterator[TokenBatch]:
        return collated(self.model, self._evaluation, self.args.ce_tokens, self.args.lm_batch_size, self.pad_id)


class HeldOutCache(HeldOut):
    """The first rows of an activation cache. They come from the same documents as the rows after them, in part."""

    def __init__(self, cache: CachedActivations, args: SAETrainingArguments) -> None:
        self.args = args
        self.num_rows = args.eval_tokens + args.calibration_tokens
        self._rows = cache.first_rows(self.num_rows)
        self._norm_limits = {site: cache.norm_limit(site) for site in cache.sites}

    def calibration(self, rank: int = 0, world_size: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        return self._slices(self.args.eval_tokens, self.num_rows, rank, world_size)

    def evaluation(self, rank: int = 0, world_size: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        return self._slices(0, self.args.eval_tokens, rank, world_size)

    def find_norm_limits(self, multiple: float | None) -> dict[Site, float | None]:
        return self._norm_limits

    def token_batches(self) -> Iterator[TokenBatch]:
        return iter(())

    def _slices(self, start: int, stop: int, rank: int, world_size: int) -> Iterator[Mapping[Site, Tensor]]:
        size = self.args.per_device_train_batch_size
        for low in range(start + rank * size, stop, world_size * size):
            yield {site: rows[low : min(stop, low + size)] for site, rows in self._rows.items()}


def collated(
    model: PreTrainedModel, windows: Sequence[Window], num_tokens: int, lm_batch_size: int, pad_id: int
) -> Iterator[TokenBatch]:
    """The first windows with at least `num_tokens` tokens that count (all where there are fewer), `lm_batch_size` at a
    time, on the model's device.
    """
    device = next(model.get_input_embeddings().parameters()).device
    taken = 0
    for start in range(0, len(windows), lm_batch_size):
        if taken >= num_tokens:
            return
        batch = collate(windows[start : start + lm_batch_size], pad_id)
        taken += int(batch["keep"].sum())
        mask = batch["attention_mask"]
        yield {
            "input_ids": batch["input_ids"].to(device),
            "attention_mask": None if mask is None else mask.to(device),
            "keep": batch["keep"].to(device),
        }


class _ShardMeter(ReconstructionMeter):
    """A meter of an SAE of which each process has some latents: it counts those, and reports on all."""

    sae: ShardedSAE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sums["fired"] = self.sums["fired"][self.sae.rows].clone()
        self.max_activation = self.max_activation[self.sae.rows].clone()

    @property
    def firing_rate(self) -> Tensor:
        return self.sae.gather_rows(self.sums["fired"]) / self.num_tokens


class Examiner:
    """Calibrates and measures learners on the held-out data of a run; all processes call it at the same time."""

    def __init__(self, model: PreTrainedModel | None, held_out: HeldOut, args: SAETrainingArguments) -> None:
        self.model, self.held_out, self.args = model, held_out, args
        # Per learner the step after which its threshold was last set, and that threshold.
        self._thresholds: dict[str, tuple[int, Tensor]] = {}

    def settle(self, learner: Learner, step: int) -> None:
        """Leave the learner's SAE as a reader gets it after `step` steps: in evaluation mode, its threshold set on
        held-out activations. All processes come to one threshold, and find it once for a step.
        """
        sae, ranks = learner.sae, learner.batch_ranks
        sae.eval()
        known = self._thresholds.get(learner.name)
        with torch.no_grad():
            if known is not None and known[0] == step:
                sae.threshold.copy_(known[1])
                return
            batches = self.held_out.calibration(ranks.rank, ranks.size)
            kept = (x[within_limit(x, sae.config.norm_limit)] for x in (batch[learner.site] for batch in batches))
            sae.calibrate_threshold((x.to(sae.device) for x in kept), ranks)
            self._thresholds[learner.name] = (step, sae.threshold.detach().clone())

    @contextmanager
    def calibrated(self, learners: Sequence[Learner], step: int) -> Iterator[None]:
        """The learners' SAEs as `settle` leaves them, and afterwards as they were, for training to go on."""
        before = [(learner.sae.training, learner.sae.threshold.detach().clone()) for learner in learners]
        try:
            for learner in learners:
                self.settle(learner, step)
            yield
        finally:
            for learner, (training, threshold) in zip(learners, before, strict=True):
                learner.sae.train(training)
                with torch.no_grad():
                    learner.sae.threshold.copy_(threshold)

    def measure(self, learner: Learner) -> Measurement:
        """Measure a calibrated SAE, and record in it what only measuring can tell: per-latent firing rates and maxima,
        L0 and FVE per prefix.
        """
        sae = learner.sae
        meter = self._reconstruction(learner)
        cross_entropy = self._cross_entropy(learner, meter.mean)
        with torch.no_grad():
            sae.max_activation.copy_(meter.max_activation)
            sae.firing_rate.copy_(meter.firing_rate[learner.rows])
        measurement = merge(meter, cross_entropy)
        sae.config.measured = measured_facts(measurement)
        return measurement

    @torch.inference_mode()
    def _reconstruction(self, learner: Learner) -> ReconstructionMeter:
        sae, ranks = learner.sae, learner.batch_ranks
        kind = _ShardMeter if isinstance(sae, ShardedSAE) else ReconstructionMeter
        meter = kind(sae, sae.config.norm_limit)  # type: ignore[arg-type]
        for batch in self.held_out.evaluation(ranks.rank, ranks.size):
            meter.update(batch[learner.site])
        meter.num_tokens, meter.num_outliers = ranks.total(meter.num_tokens), ranks.total(meter.num_outliers)
        meter.sums = {name: ranks.sum(total) for name, total in meter.sums.items()}
        meter.max_activation = ranks.maximum(meter.max_activation)
        if meter.num_tokens == 0:
            raise InputError("Nothing to measure: the held-out data gave no activation.")
        return meter

    def _cross_entropy(self, learner: Learner, mean: Tensor) -> Measurement | None:
        """Of the main process, or of all, where they must run the language model in step: because each has a part of
        it, or of the SAE.
        """
        if self.model is None or not predicts_next_token(self.model):
            return None
        if learner.batch_ranks.rank and not self.held_out.together:
            return None
        batches = list(self.held_out.token_batches()) if self.args.ce_tokens else []
        if not batches:
            return None
        limit = learner.sae.config.norm_limit
        return measure_cross_entropy(self.model, learner.site, learner.sae, mean, batches, limit)
