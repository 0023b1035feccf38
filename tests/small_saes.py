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
