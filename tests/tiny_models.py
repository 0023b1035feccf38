"""Tiny random models of many architectures."""

from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

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
MAMBA = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}
DECODERS: dict[str, dict] = {
    "bloom": {**TOKENS, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "cohere": PLAIN,
    "falcon": PLAIN,
    "gemma2": HEAD_DIM,
    "gemma3_text": HEAD_DIM,
    "glm4": HEAD_DIM,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        **TOKENS,
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local", "global"], 1]],
        "max_position_embeddings": 64,
    },
    "gpt_neox": PLAIN,
    "gpt_oss": {**HEAD_DIM, "num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gptj": {**GPT, "rotary_dim": 4},
    "llama": PLAIN,
    "llama4_text": {**HEAD_DIM, "intermediate_size_mlp": 48, "num_local_experts": 2},
    "mamba": MAMBA,
    "mistral": PLAIN,
    "mixtral": {**PLAIN, "num_local_experts": 4},
    "mpt": {**TOKENS, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    "olmo2": PLAIN,
    "opt": {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": PLAIN,
    "phi3": PLAIN,
    "qwen2": PLAIN,
    "qwen3": HEAD_DIM,
    "stablelm": PLAIN,
    "starcoder2": PLAIN,
}
ENCODERS: dict[str, dict] = {
    "bert": PLAIN,
    "deberta-v2": PLAIN,
    "distilbert": {**TOKENS, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    "modernbert": {**PLAIN, "cls_token_id": 1, "sep_token_id": 2},
    "mpnet": PLAIN,
    "roberta": PLAIN,
}


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Weights wide enough that one layer's edit moves the greedy choice, instead of the near-silent usual ones."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("weight") and weight.ndim == 2:
            weight.data.normal_(std=0.3)
    return model.eval()


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    auto = AutoModelForCausalLM if name in DECODERS else AutoModelForMaskedLM
    config = AutoConfig.for_model(name, **(DECODERS[name] if name in DECODERS else ENCODERS[name]))
    return randomise(auto.from_config(config, dtype=dtype))


tiny = cache(build)  # shared by the tests that leave a model as they found it
