"""Names of TransformerLens against ours: inverse of each other, and meaning what TransformerLens means by them."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_msae.formats import saelens_names as names
from hf_msae.sites import Site, capture, resolve_site

HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
INNER_HOOKS = ("attn.hook_z", "mlp.hook_post")
MODELS = ("gpt2", "EleutherAI/pythia-70m", "google/gemma-2-2b", "google/gemma-2b", "meta-llama/Llama-3.1-8B", None)


def tiny(base_model: str) -> PreTrainedModel:
    """A random model of the architecture of `base_model`."""
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "max_position_embeddings": 32, "hidden_size": 16, "intermediate_size": 24}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    if base_model == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    if base_model.startswith("EleutherAI"):
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shape)).eval()
    shape |= {"num_key_value_heads": 1, "head_dim": 8}
    if base_model.startswith("google/gemma-2-"):
        model = Gemma2ForCausalLM(Gemma2Config(**shape)).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:  # a norm that did nothing would not tell its input from its output
                torch.nn.init.normal_(parameter)
        return model
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


@pytest.mark.parametrize("base_model", MODELS)
def test_hooks_and_sites_are_inverse(base_model: str | None) -> None:
    known = 0
    for hook in (*(f"blocks.{n}.{name}" for n in (0, 17) for name in (*HOOKS, *INNER_HOOKS)), "hook_embed"):
        site = names.site_of_hook(hook, base_model)
        if site is not None and base_model is not None and not (hook == "hook_embed" and "gemma" in base_model):
            known += 1
            assert names.hook_of_site(site, base_model) == hook
            assert names.hook_of_site(str(Site.parse(site)), base_model) == hook
    assert base_model is None or known >= 12


@pytest.mark.parametrize(
    ("site", "base_model", "hook"),
    [
        ("model.layers.12:output", "google/gemma-2-2b", "blocks.12.hook_resid_post"),
        ("model.language_model.layers.7", "google/gemma-3-4b-pt", "blocks.7.hook_resid_post"),
        ("transformer.h.3.mlp:output", "gpt2", "blocks.3.hook_mlp_out"),
        ("h.3:input", "gpt2", "blocks.3.hook_resid_pre"),
        ("gpt_neox.layers.3.attention:output", "EleutherAI/pythia-70m", "blocks.3.hook_attn_out"),
        ("model.layers.3.self_attn.o_proj:input", "meta-llama/Llama-3.1-8B", "blocks.3.attn.hook_z"),
        ("transformer.wte", "gpt2", "hook_embed"),
        # Gemma 2 normalises a sublayer's output before adding it, and the hook is after that.
        ("model.layers.3.mlp", "google/gemma-2-2b", None),
        ("model.layers.3.post_feedforward_layernorm", "google/gemma-2-2b", "blocks.3.hook_mlp_out"),
        ("model.embed_tokens", "google/gemma-2-2b", None),
        ("model.vision_tower.encoder.layers.3", "google/gemma-3-4b-pt", None),
        ("model.layers.3.mlp:input", "meta-llama/Llama-3.1-8B", None),
    ],
)
def test_canonical_paths_to_hooks(site: str, base_model: str, hook: str | None) -> None:
    assert names.hook_of_site(site, base_model) == hook


def test_other_names_are_kept_or_given_up() -> None:
    assert names.site_of_hook("model.layers.12", None) == "model.layers.12:output"
    assert names.site_of_hook("blocks.12.hook_resid_post", None) == "layers.12"
    assert (
        names.site_of_hook("blocks.12.hook_mlp_out", "google/gemma-3-1b-pt") == "layers.12.post_feedforward_layernorm"
    )
    assert names.site_of_hook("blocks.12.hook_resid_mid", "EleutherAI/pythia-70m") is None
    assert names.site_of_hook("blocks.12.attn.hook_z", None) is None
    assert names.site_of_hook("ln_final.hook_normalized", "gpt2") is None
    assert names.site_of_path("model.layers.12.self_attn.o_proj.input") == "model.layers.12.self_attn.o_proj:input"
    assert names.site_of_path("model.layers.12.output") == "model.layers.12:output"
    assert names.site_of_path("model.layers.12") == "model.layers.12:output"


@pytest.mark.parametrize("base_model", [model for model in MODELS if model and model != "google/gemma-2b"])
def test_sites_hold_what_transformerlens_hooks(base_model: str) -> None:
    """What a block adds is what its hooks say: the residual stream after is the one before plus both sublayers."""
    model, tokens = tiny(base_model), torch.arange(7).unsqueeze(0)
    sites = {hook: names.site_of_hook(f"blocks.1.{hook}", base_model) for hook in (*HOOKS, *INNER_HOOKS)}
    resolved = {hook: resolve_site(model, site) for hook, site in sites.items() if site}
    values = capture(model, list(resolved.values()), input_ids=tokens)
    at = {hook: values[site] for hook, site in resolved.items()}
    close = {"rtol": 1e-5, "atol": 1e-5}
    after = at["hook_resid_pre"] + at["hook_attn_out"] + at["hook_mlp_out"]
    torch.testing.assert_close(at["hook_resid_post"], after, **close)
    assert at["hook_attn_out"].abs().mean() > 1e-4
    assert at["hook_mlp_out"].abs().mean() > 1e-4
    if "hook_resid_mid" in at:
        torch.testing.assert_close(at["hook_resid_mid"], at["hook_resid_pre"] + at["hook_attn_out"], **close)
    assert at["attn.hook_z"].shape == (1, 7, 16)
    assert at["mlp.hook_post"].shape == (1, 7, 64 if base_model == "gpt2" else 24)
    # Canonical paths lead back to the hooks.
    assert {hook: names.hook_of_site(str(site), base_model) for hook, site in resolved.items()} == {
        hook: f"blocks.1.{hook}" for hook in resolved
    }


@pytest.mark.parametrize(
    ("lens", "hub"),
    [
        ("gpt2-small", "gpt2"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("Llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("gpt2-xl", "gpt2-xl"),
    ],
)
def test_names_of_models(lens: str, hub: str) -> None:
    assert names.model_on_hub(lens) == hub
    assert names.model_on_hub(hub) == hub
    assert names.model_in_lens(hub) == lens


def test_names_of_unknown_models() -> None:
    assert names.model_on_hub("my-model") is None
    assert names.model_on_hub("someone/model") == "someone/model"
    assert names.model_in_lens("someone/model") is None
    assert names.model_in_lens("openai-community/gpt2") == "gpt2-small"


@pytest.mark.peer
def test_model_table_is_transformerlens_own() -> None:
    reason = "needs TransformerLens, which comes with SAELens"
    supported = pytest.importorskip("transformer_lens.supported_models", reason=reason)
    hub_ids = {alias: hub for hub, aliases in supported.MODEL_ALIASES.items() for alias in aliases}
    hub_ids |= {name: name for name in supported.OFFICIAL_MODEL_NAMES}
    table = names._HUB_NAMES
    assert len(table) > 100
    assert {lens: hub_ids.get(lens) for lens in table} == table
