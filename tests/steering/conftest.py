"""Tiny random models of many architectures, and SAEs that fire on them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from transformers import PreTrainedModel

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import capture, resolve_site

sys.path.append(str(Path(__file__).parent))  # for what lies here: pytest's importlib mode adds nothing

ARCHITECTURES = (
    "bloom",
    "cohere",
    "falcon",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gptj",
    "llama",
    "mamba",
    "mistral",
    "mixtral",
    "mpt",
    "olmo2",
    "opt",
    "phi3",
    "qwen3",
)


def build_sae(model: PreTrainedModel, site: str = "layers.1", seed: int = 0, **changes: Any) -> MatryoshkaSAE:
    """An SAE of 48 latents, 8 of them active on a token, with maxima as a training run leaves them."""
    torch.manual_seed(seed)
    resolved = resolve_site(model, site)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (16, 24))
    x = capture(model, [resolved], input_ids=ids)[resolved].flatten(0, 1)
    shape = {"hidden_size": x.shape[1], "num_latents": 48, "prefix_sizes": [8, 24, 48], "k": 8, "site": str(resolved)}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**(shape | changes))).eval()
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
        sae.calibrate_threshold([x])
        sae.max_activation.copy_(sae.encode(x).amax(0).clamp_min(0.1))
    return sae


@pytest.fixture(scope="session")
def decoder() -> Callable[[str], PreTrainedModel]:
    """A tiny causal LM by the name of its architecture, the same object every time."""
    return tiny


@pytest.fixture(scope="session")
def make_sae() -> Callable[..., MatryoshkaSAE]:
    return build_sae


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="session")
def sae(llama: PreTrainedModel) -> MatryoshkaSAE:
    """Of `llama`, layer 1; not to be changed."""
    return build_sae(llama)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each of 17 architectures."""
    return request.param
