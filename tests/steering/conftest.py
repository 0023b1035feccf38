"""Tiny random models of many architectures, and SAEs that fire on them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import capture, resolve_site

TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
HEAD_DIM = {**PLAIN, "head_dim": 8}
GPT = {**TOKENS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
DECODERS: dict[str, dict[str, Any]] = {
    "bloom": {**TOKENS, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "cohere": PLAIN,
    "falcon": PLAIN,
    "gemma2": HEAD_DIM,
    "gemma3_text": HEAD_DIM,
    "gpt2": GPT,
    "gpt_neox": PLAIN,
    "gptj": {**GPT, "rotary_dim": 4},
    "llama": PLAIN,
    "mamba": {**TOKENS, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8},
    "mistral": PLAIN,
    "mixtral": {**PLAIN, "num_local_experts": 4},
    "mpt": {**TOKENS, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    "olmo2": PLAIN,
    "opt": {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": PLAIN,
    "qwen3": HEAD_DIM,
}


@cache
def build_model(name: str) -> PreTrainedModel:
    """Weights wide enough that one layer's edit moves the greedy choice."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **DECODERS[name]))
    torch.manual_seed(0)
    for weight_name, weight in model.named_parameters():
        if weight_name.endswith("weight") and weight.ndim == 2:
            weight.data.normal_(std=0.3)
    return model.eval()


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
    return build_model


@pytest.fixture(scope="session")
def make_sae() -> Callable[..., MatryoshkaSAE]:
    return build_sae


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return build_model("llama")


@pytest.fixture(scope="session")
def sae(llama: PreTrainedModel) -> MatryoshkaSAE:
    """Of `llama`, layer 1; not to be changed."""
    return build_sae(llama)


@pytest.fixture(params=sorted(DECODERS))
def architecture(request: pytest.FixtureRequest) -> str:
    """Each of 17 architectures."""
    return request.param
