"""Measuring SAEs in the middle and at the end of training, as a reader of the checkpoint would find them.

In training `batch_topk` and `topk` select by rank; a reader selects by threshold. So whatever is saved or measured is
first calibrated on held-out activations, and the learner gets its own threshold back afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_msae.metrics import Measurement, measure_cross_entropy, measure_reconstruction, merge
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.held_out import HeldOut
from hf_msae.training.learner import Learner


class Examiner:
    """Calibrates and measures learners on the held-out data of a run."""

    def __init__(self, model: PreTrainedModel | None, held_out: HeldOut, args: SAETrainingArguments) -> None:
        self.model, self.held_out, self.args = model, held_out, args
        # Per learner the step after which its threshold was last set, and that threshold.
        self._thresholds: dict[str, tuple[int, Tensor]] = {}

    @contextmanager
    def calibrated(self, learner: Learner, step: int) -> Iterator[None]:
        """The learner's SAE as a reader gets it after `step` steps: in evaluation mode, its threshold set on held-out
        activations.
        """
        sae = learner.sae
        training_threshold = sae.threshold.detach().clone()
        sae.eval()
        known = self._thresholds.get(learner.name)
        with torch.no_grad():
            if known is not None and known[0] == step:
                sae.threshold.copy_(known[1])
            else:
                sae.calibrate_threshold(batch[learner.site].to(sae.device) for batch in self.held_out.calibration())
                self._thresholds[learner.name] = (step, sae.threshold.detach().clone())
        try:
            yield
        finally:
            sae.train()
            with torch.no_grad():
                sae.threshold.copy_(training_threshold)

    def measure(self, learner: Learner) -> Measurement:
        """Measure a calibrated SAE, and record in it what only measuring can tell: per-latent firing rates and maxima,
        L0 and FVE per prefix.
        """
        sae, name = learner.sae, learner.name
        meter = measure_reconstruction({name: (learner.site, sae)}, self.held_out.evaluation())[name]
        cross_entropy = None
        if self.model is not None and self.model.get_output_embeddings() is not None and self.args.ce_tokens:
            batches = list(self.held_out.token_batches())
            if batches:
                cross_entropy = measure_cross_entropy(self.model, learner.site, sae, meter.mean, batches)
        with torch.no_grad():
            sae.max_activation.copy_(meter.max_activation)
            sae.firing_rate.copy_(meter.firing_rate)
        measurement = merge(meter, cross_entropy)
        sae.config.measured = {
            "tokens": measurement.tokens,
            "l0": [round(level.l0, 4) for level in measurement.levels],
            "fve": [round(level.fve, 5) for level in measurement.levels],
        }
        return measurement
