"""What several commands are tried on."""

from pathlib import Path

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    """The folder of an untrained SAE of the story model whose every latent has 10 as its maximum."""
    torch.manual_seed(0)
    config = MatryoshkaSAEConfig(hidden_size=128, num_latents=64, k=4, site="layers.2", base_model="stories")
    sae = MatryoshkaSAE(config).eval()
    sae.max_activation.fill_(10.0)
    sae.save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"
