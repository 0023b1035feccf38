"""Sampling with a seed of its own.

`generate` draws from torch's global generator, so the text that one user sees depends on who else generates at the
time. Here the randomness of a call is its own: Gumbel noise is added to the log-probabilities and the largest taken,
which samples from them exactly (Gumbel, 1954). Steered and unsteered text of one seed share their noise, so what
differs between them is the steering's doing.
"""

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_msae.modeling.devices import sent


class GumbelNoise(LogitsProcessor):
    """Adds noise to log-probabilities (batch, vocabulary), so that greedy search samples. Serves one `generate`.

    Row r draws from a generator seeded with seed + r, so that a batch gives what its rows give alone.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Noisy log-probabilities in float32."""
        for row in range(len(self.generators), len(scores)):
            self.generators.append(torch.Generator().manual_seed(self.seed + row))
        # Drawn on the CPU, so that a seed means the same on every device. Above 0 everywhere, as a logarithm needs.
        uniform = torch.stack([torch.rand(scores.shape[1], generator=row) for row in self.generators[: len(scores)]])
        uniform = sent(uniform.clamp_min(torch.finfo(torch.float32).tiny), scores.device)
        return scores.float().log_softmax(-1) - (-uniform.log()).log()


def seeded_sampling(
    seed: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> LogitsProcessorList:
    """What `generate(logits_processor=..., do_sample=False)` needs to sample with this seed, for one call.

    temperature: 0 is greedy.
    Raises ValueError, from transformers, for a temperature below 0, a top_k below 1, a top_p outside (0, 1].
    """
    processors = LogitsProcessorList()
    if temperature == 0:
        return processors
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p != 1:
        processors.append(TopPLogitsWarper(top_p))
    processors.append(GumbelNoise(seed))
    return processors
