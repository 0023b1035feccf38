"""A small world of SynthSAEBench, and SAEs that read it, for the tests of either and beside SAELens."""

import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.research.toys import SynthBenchSettings, SynthBenchWorld

SMALL = SynthBenchSettings().scaled(512)


def make_sae(world: SynthBenchWorld, rows: torch.Tensor, threshold: float = 0.5) -> MatryoshkaSAE:
    number = len(rows)
    config = MatryoshkaSAEConfig(
        hidden_size=world.settings.hidden_size, num_latents=number, prefix_sizes=[number], k=min(4, number)
    )
    sae = MatryoshkaSAE(config).eval()
    with torch.no_grad():
        sae.W_enc.copy_(rows), sae.W_dec.copy_(rows), sae.b_dec.copy_(world.bias), sae.b_enc.zero_()
    sae.threshold.fill_(threshold)
    return sae
