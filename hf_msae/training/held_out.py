"""Data that no SAE is trained on, some to set inference thresholds with and some to measure on, and how that is done.

The two are kept apart, so that the L0 that is reported is that of a threshold which never saw those tokens.

In training `batch_topk` and `topk` select by rank; a reader selects by threshold. So whatever is saved, measured or
shown to callbacks as such is first calibrated on held-out activations. In the middle of training the learner gets its
own threshold back afterwards; at the end the SAE stays as it was measured.

Several processes share the held-out tokens, or, where each has some of the latents, go through all of them together;
the numbers come out the same. Cross-entropy alone is left to the main process where it has the whole SAE.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from accelerate.utils import tqdm
from torch import Tensor
from transformers import PreTrainedModel

from hf_msae.cross_entropy import measure_cross_entropy, why_no_next_token, why_no_recovery, without_recovery
from hf_msae.data import (
    CachedActivations,
    Documents,
    TokenBatch,
    Window,
    collate,
    find_norm_limits,
    harvest,
    hold_out_for_training,
)
from hf_msae.data.populations import Population
from hf_msae.errors import InputError
from hf_msae.metrics import Measurement, ReconstructionMeter, measured_facts, merge
from hf_msae.outliers import within_limit
from hf_msae.sites import Site
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.learner import Learner
from hf_msae.training.loaders import TextSource
from hf_msae.training.sharded import ShardedSAE

logger = logging.getLogger(__name__)
Batch = TypeVar("Batch")


class HeldOut(ABC):
    """Held-out activations, given anew in every pass.

    Attributes:
        tensor_parallel: Whether all processes must ask for the same at the same time, because they run one language
            model.
        why_no_tokens: Why there are none to measure cross-entropy on; None where there are.
        facts: How it was chosen, JSON-able.
    """

    tensor_parallel: bool = False
    why_no_tokens: str | None = None
    facts: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def calibration(self, rank: int = 0, num_processes: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        """One process's part of the activations for setting thresholds, each (n, hidden_size)."""

    @abstractmethod
    def evaluation(self, rank: int = 0, num_processes: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        """One process's part of the activations for measuring, each (n, hidden_size)."""

    @abstractmethod
    def token_batches(self) -> Iterator[TokenBatch]:
        """Token batches for measuring cross-entropy, `args.ce_tokens` in all; none where there is no text."""


class HeldOutText(HeldOut):
    """Documents that their contents chose (`data.hash_split`), through the language model whenever they are needed.

    Where all processes run one language model together, each goes through all windows, and keeps its part of the
    activations.

    Args:
        source: What turns documents into activations.
        documents: Where they are taken from.
        args: How many tokens, and in which windows.

    Attributes:
        split: What training must leave out, where it reads the same documents.
        facts: What metrics.json says of them.

    Raises:
        DatasetError: Where there are too few tokens.
    """

    def __init__(self, source: TextSource, documents: Documents, args: SAETrainingArguments) -> None:
        self.source, self.args, self.tensor_parallel = source, args, source.tensor_parallel
        held_out = hold_out_for_training(
            documents,
            source.tokenizer,
            source.context_length,
            args.eval_tokens,
            args.calibration_tokens,
            args.packing,
            vocab_size=source.vocab_size,
        )
        measuring, calibration, self.split = held_out.measuring, held_out.calibration, held_out.split
        self.facts = {"measuring": measuring.facts(), "calibration": calibration.facts()}
        self._evaluation, self._calibration = measuring.windows, calibration.windows
        self.why_no_tokens = None if args.ce_tokens else "ce_tokens is 0"

    def calibration(self, rank: int = 0, num_processes: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        """One process's part of the activations for setting thresholds, each (n, hidden_size)."""
        return self._harvest(self._calibration, rank, num_processes)

    def evaluation(self, rank: int = 0, num_processes: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        """One process's part of the activations for measuring, each (n, hidden_size)."""
        return self._harvest(self._evaluation, rank, num_processes)

    def _harvest(self, windows: Sequence[Window], rank: int, num_processes: int) -> Iterator[Mapping[Site, Tensor]]:
        source = self.source
        options = {"lm_batch_size": self.args.lm_batch_size, "pad_id": source.pad_id}
        if self.tensor_parallel:
            yield from islice(harvest(source.model, source.sites, windows, **options), rank, None, num_processes)
        else:
            yield from harvest(source.model, source.sites, windows[rank::num_processes], **options)

    def find_norm_limits(self) -> dict[Site, float | None]:
        """At each site the norm beyond which activations are outliers, 0 where all count."""
        found = find_norm_limits(
            self.source.model,
            self.source.sites,
            self._evaluation,
            multiple=self.args.norm_outlier_multiple,
            lm_batch_size=self.args.lm_batch_size,
            pad_id=self.source.pad_id,
        )
        return {**found}

    def token_batches(self) -> Iterator[TokenBatch]:
        """Token batches for measuring cross-entropy, `args.ce_tokens` in all."""
        source, args = self.source, self.args
        return collated(source.model, self._evaluation, args.ce_tokens, args.lm_batch_size, source.pad_id)


class HeldOutCache(HeldOut):
    """The first rows of an activation cache. They come from the same documents as the rows after them, in part.

    Args:
        cache: The activations.
        args: How many rows.
    """

    why_no_tokens = "what is held out is activations of a cache, which has no text; give an eval_dataset"

    def __init__(self, cache: CachedActivations, args: SAETrainingArguments) -> None:
        self.args = args
        self.num_rows = args.eval_tokens + args.calibration_tokens
        self._rows = cache.first_rows(self.num_rows)

    def calibration(self, rank: int = 0, num_processes: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        """One process's part of the rows for setting thresholds, each (n, hidden_size)."""
        return self._slices(self.args.eval_tokens, self.num_rows, rank, num_processes)

    def evaluation(self, rank: int = 0, num_processes: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        """One process's part of the rows for measuring, each (n, hidden_size)."""
        return self._slices(0, self.args.eval_tokens, rank, num_processes)

    def token_batches(self) -> Iterator[TokenBatch]:
        """None: a cache holds no text."""
        return iter(())

    def _slices(self, start: int, stop: int, rank: int, num_processes: int) -> Iterator[Mapping[Site, Tensor]]:
        size = self.args.per_device_train_batch_size
        for low in range(start + rank * size, stop, num_processes * size):
            yield {site: rows[low : min(stop, low + size)] for site, rows in self._rows.items()}


def collated(
    model: PreTrainedModel, windows: Sequence[Window], num_tokens: int, lm_batch_size: int, pad_id: int
) -> Iterator[TokenBatch]:
    """Batches of the first windows that hold enough tokens, on the model's device.

    Args:
        model: The language model.
        windows: Windows of tokens.
        num_tokens: How many tokens that count are wanted; all windows are taken where there are fewer.
        lm_batch_size: Windows of a batch.
        pad_id: The token id that fills windows up.

    Yields:
        Batches as [`hf_msae.cross_entropy.measure_cross_entropy`] takes them.
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


def _inlying(learner: Learner, batch: Mapping[Site, Tensor]) -> Tensor:
    """Which of a batch's tokens are no outliers where the SAE reads, nor where it writes, bool (n,)."""
    config, x = learner.sae.config, batch[learner.site]
    inlying = within_limit(x, config.norm_limit)
    if not config.is_transcoder:
        return inlying
    return inlying & within_limit(batch[learner.output_site], config.norm_limit_out).to(x.device)


def _meter(learner: Learner) -> ReconstructionMeter:
    sae = learner.sae
    kind = _ShardMeter if isinstance(sae, ShardedSAE) else ReconstructionMeter
    return kind(sae, sae.config.norm_limit)  # type: ignore[arg-type]


class Evaluator:
    """Calibrates and measures learners on the held-out data of a run; all processes call it at the same time.

    Args:
        model: The language model, for cross-entropy; None where there is none.
        held_out: The data.
        disable_tqdm: Show no progress bar.
    """

    def __init__(self, model: PreTrainedModel | None, held_out: HeldOut, disable_tqdm: bool = False) -> None:
        self.model, self.held_out, self.disable_tqdm = model, held_out, disable_tqdm
        # Per learner the step after which its threshold was last set, and that threshold.
        self._thresholds: dict[str, tuple[int, Tensor]] = {}
        # What the activations that were measured last are like, at each site.
        self.populations: dict[Site, Population] = {}

    def calibrate(self, learner: Learner, step: int) -> None:
        """Leave the learner's SAE as a reader gets it: in evaluation mode, its threshold set on held-out activations.

        All processes come to one threshold, and find it once for a step.

        Args:
            learner: Whose SAE it is.
            step: How many steps it has taken.
        """
        sae, ranks = learner.sae, learner.data_parallel
        sae.eval()
        known = self._thresholds.get(learner.name)
        with torch.no_grad():
            if known is not None and known[0] == step:
                sae.threshold.copy_(known[1])
                return
            batches = self._shown(self.held_out.calibration(ranks.rank, ranks.size), f"Threshold of {learner.name}")
            kept = (batch[learner.site][_inlying(learner, batch)] for batch in batches)
            sae.calibrate_threshold((x.to(sae.device) for x in kept), ranks)
            self._thresholds[learner.name] = (step, sae.threshold.detach().clone())

    @contextmanager
    def calibrated(self, learners: Sequence[Learner], step: int) -> Iterator[None]:
        """The learners' SAEs as `calibrate` leaves them, and afterwards as they were, for training to go on.

        Args:
            learners: Whose SAEs they are.
            step: How many steps they have taken.
        """
        before = [(learner.sae.training, learner.sae.threshold.detach().clone()) for learner in learners]
        try:
            for learner in learners:
                self.calibrate(learner, step)
            yield
        finally:
            for learner, (training, threshold) in zip(learners, before, strict=True):
                learner.sae.train(training)
                with torch.no_grad():
                    learner.sae.threshold.copy_(threshold)

    def measure(self, learners: Sequence[Learner]) -> dict[str, Measurement]:
        """Measure calibrated SAEs, and record in them what only measuring can tell.

        That is each latent's firing rate and largest activation, and L0 and FVE of every prefix. The held-out text is
        read once for all of them.

        Args:
            learners: Whose SAEs they are.

        Returns:
            Of each, by the learner's name, the numbers of every prefix; cross-entropies on the main process.

        Raises:
            InputError: Where the held-out data gives no activation.
        """
        meters = self._reconstruction(learners)
        reason = self._why_no_cross_entropy()
        measurements = {}
        for learner in learners:
            sae, meter = learner.sae, meters[learner.name]
            cross_entropy = None if reason else self._cross_entropy(learner, meter.mean)
            with torch.no_grad():
                sae.max_activation.copy_(meter.max_activation)
                sae.firing_rate.copy_(meter.firing_rate[learner.rows])
            measurement = merge(meter, cross_entropy)
            measurement.ce_absent = measurement.ce_absent or reason
            sae.config.measured = measured_facts(measurement)
            measurements[learner.name] = measurement
        return measurements

    @torch.inference_mode()
    def _reconstruction(self, learners: Sequence[Learner]) -> dict[str, ReconstructionMeter]:
        ranks = learners[0].data_parallel  # those of all: a run's SAEs are split alike
        meters = {learner.name: _meter(learner) for learner in learners}
        for batch in self._shown(self.held_out.evaluation(ranks.rank, ranks.size), "Measuring"):
            for learner in learners:
                own = learner.own_part(batch)
                meters[learner.name].update(own.x, own.target, own.token_ids)
        for learner in learners:
            meter = meters[learner.name]
            meter.num_tokens, meter.num_outliers = ranks.total(meter.num_tokens), ranks.total(meter.num_outliers)
            meter.sums = {name: ranks.sum(total) for name, total in meter.sums.items()}
            meter.max_activation = ranks.maximum(meter.max_activation)
            if meter.num_tokens == 0:
                raise InputError("Nothing to measure: the held-out data gave no activation.")
            x, x_squared = meter.sums["x"].clone(), meter.sums["x_squared"].clone()
            self.populations[learner.output_site] = Population(meter.num_tokens, x, x_squared)
        return meters

    def _shown(self, batches: Iterable[Batch], what: str) -> Iterator[Batch]:
        """The batches, with a bar that counts them; of the main process alone."""
        return iter(tqdm(batches, desc=what, unit="batch", disable=self.disable_tqdm, leave=False))

    def _cross_entropy(self, learner: Learner, mean: Tensor) -> Measurement | None:
        """Cross-entropies, on the main process alone, or on all, where each has a part of the model or of the SAE."""
        if learner.data_parallel.rank and not self.held_out.tensor_parallel:
            return None
        assert self.model is not None
        batches = self._shown(self.held_out.token_batches(), f"Cross-entropy of {learner.name}")
        places = (learner.site, learner.sae, mean, batches, learner.sae.config.norm_limit, learner.output_site)
        found = measure_cross_entropy(self.model, *places)
        reason = why_no_recovery(found, self.model)
        if reason is None:
            return found
        logger.warning("No cross-entropy recovered is reported: %s.", reason)
        return without_recovery(found, reason)

    def _why_no_cross_entropy(self) -> str | None:
        """Why there is nothing to measure it with; None where there is."""
        if self.model is None:
            return "there is no language model beside the activations"
        return self.held_out.why_no_tokens or why_no_next_token(self.model)
