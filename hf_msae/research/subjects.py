"""On which of the SAEs that are evaluated the papers' instruments are run."""

from hf_msae.evaluation.metric import MetricInputs
from hf_msae.modeling import MatryoshkaSAE

# Baselines whose directions nobody trained. The instruments ask what training made of directions.
UNTRAINED = ("frozen_decoder", "pca", "random")
# A meta-SAE and a law of importance need some latents that fire.
MIN_FIRING = 16


def trained_saes(inputs: MetricInputs) -> dict[str, MatryoshkaSAE]:
    """SAEs whose directions were trained and of which enough latents fire, by name.

    Args:
        inputs: what is evaluated.
    """
    return {
        subject.name: subject.sae
        for subject in inputs.subjects
        if subject.method not in UNTRAINED and int((inputs.firing_rates[subject.name] > 0).sum()) >= MIN_FIRING
    }
