"""Measuring SAEs in the middle and at the end of training, as a reader of the checkpoint would find them.

In training `batch_topk` and `topk` select by rank; a reader selects by threshold. So whatever is saved, measured or
shown to callbacks as such is first calibrated on held-out activations. In the middle of training the learner gets its
own threshold back afterwards; at the end the SAE stays as it was measured.

Several processes share the held-out tokens, or, where each has some of the latents, go through all of them together;
the numbers come out the same. Cross-entropy alone is left to the main process where it has the whole SAE.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_msae.errors import InputError
from hf_msae.metrics import (
    Measurement,
    ReconstructionMeter,
    measure_cross_entropy,
    measured_facts,
    merge,
    predicts_next_token,
)
from hf_msae.outliers import within_limit
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.held_out import HeldOut
from hf_msae.training.learner import Learner
from hf_msae.training.sharded import ShardedSAE


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
