"""SAEs whose numbers are known."""

import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig


def copying_sae(scale: float = 1.0) -> MatryoshkaSAE:
    """Latents relu(x) and relu(-x), decoded to exactly `scale` times x."""
    config = MatryoshkaSAEConfig(
        hidden_size=16, num_latents=32, prefix_sizes=[16, 32], k=32, activation="relu", apply_b_dec_to_input=False
    )
    sae = MatryoshkaSAE(config).eval()
    signs = torch.cat([torch.eye(16), -torch.eye(16)])
    with torch.no_grad():
        sae.W_enc.copy_(signs)
        sae.W_dec.copy_(scale * signs)
    return sae


def rough_sae(seed: int, num_latents: int = 20, width: int = 6) -> MatryoshkaSAE:
    """Random, with decoder rows of all lengths."""
    config = MatryoshkaSAEConfig(hidden_size=width, num_latents=num_latents, prefix_sizes=[7, num_latents], k=5)
    sae = MatryoshkaSAE(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for rows in (sae.W_enc, sae.W_dec):
            rows.copy_(torch.randn(rows.shape, generator=generator) * (0.3 + torch.rand(len(rows), 1)))
    sae.threshold.fill_(0.3)
    return sae
