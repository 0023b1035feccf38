"""What several commands are tried on."""

from pathlib import Path

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig


def untrained_sae() -> MatryoshkaSAE:
    """An untrained SAE of the story model."""
    torch.manual_seed(0)
    config = MatryoshkaSAEConfig(hidden_size=128, num_latents=64, k=4, site="layers.2", base_model="stories")
    return MatryoshkaSAE(config).eval()


@pytest.fixture(scope="session")
def firing() -> MatryoshkaSAE:
    """Such an SAE with a threshold that some of its latents exceed."""
    sae = untrained_sae()
    sae.threshold.fill_(0.5)
    return sae


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    """The folder of an untrained SAE of the story model whose every latent has 10 as its maximum."""
    sae = untrained_sae()
    sae.max_activation.fill_(10.0)
    sae.save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"
