"""What only text can tell of an SAE, written into it: for checkpoints of other libraries, which record none of it.

People steer in units of a latent's largest activation, and choose latents by how often they fire. A batch TopK SAE
that was saved without a threshold computes nothing for a token alone, until one is set on text.
"""

import torch

from hf_msae.evaluation.activations import TextActivations
from hf_msae.metrics import Measurement, ReconstructionMeter, measured_facts, merge
from hf_msae.modeling import MatryoshkaSAE


def lacks_threshold(sae: MatryoshkaSAE) -> bool:
    """Whether an SAE selects by a threshold that was never set.

    Args:
        sae: the SAE.
    """
    by_threshold = sae.config.activation == "batch_topk" and sae.config.inference == "threshold"
    return by_threshold and not bool(sae.threshold.any())


@torch.no_grad()
def complete(sae: MatryoshkaSAE, text: TextActivations) -> Measurement:
    """Record in an SAE what only text can tell of it.

    This is each latent's maximum and firing rate, L0 and FVE per prefix, and the limit of the norm. Where it has no
    threshold, one is set on the first half of the text, and the second half is measured on.

    Args:
        sae: in evaluation mode; it is changed.
        text: activations of its site.

    Returns:
        What was measured.
    """
    x = text.x
    if lacks_threshold(sae):
        half = len(x) // 2
        sae.calibrate_threshold(part.to(sae.device) for part in sae.in_parts(x[:half]))
        x = x[half:]
    meter = ReconstructionMeter(sae)
    meter.update(x)
    sae.max_activation.copy_(meter.max_activation)
    sae.firing_rate.copy_(meter.firing_rate)
    measurement = merge(meter, None)
    sae.config.measured = measured_facts(measurement)
    sae.config.norm_limit = text.norm_limit
    return measurement
