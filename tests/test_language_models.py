"""Checkpoints of many architectures, saved with and without what they need: what is loaded is what was saved."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    CLIPVisionConfig,
    Gemma3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2Config,
    Qwen2VLConfig,
    T5Config,
)

from hf_msae import MatryoshkaSAEConfig
from hf_msae.cli import sources
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cross_entropy import predicts_next_token
from hf_msae.errors import HfMsaeError, InputError
from hf_msae.language_models import count_parameters, load_language_model, load_language_model_config, model_to_load
from hf_msae.sites import capture, resolve_site
from hf_msae.worlds.stories import STORIES, load_story_lm

pytestmark = pytest.mark.slow

WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**WIDE, "vocab_size": 80, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
EYES = {**WIDE, "image_size": 28, "patch_size": 14}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
CAUSAL = {
    "llama": lambda **tied: LlamaConfig(**TEXT, **tied),
    "qwen2": lambda **tied: Qwen2Config(**TEXT, **tied),
    "gpt2": lambda **tied: GPT2Config(vocab_size=80, n_embd=16, n_layer=2, n_head=2, **tied),
    "gpt_neox": lambda **tied: GPTNeoXConfig(**WIDE, vocab_size=80, **tied),
}
WITH_IMAGES = {
    "gemma3": lambda **tied: Gemma3Config(
        text_config={**TEXT, **tied}, vision_config=EYES, mm_tokens_per_image=1, **tied
    ),
    "qwen2_vl": lambda **tied: Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE, **tied},
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 14},
        **tied,
    ),
    "llava": lambda **tied: LlavaConfig(
        text_config=LlamaConfig(**TEXT, **tied), vision_config=CLIPVisionConfig(**EYES), **tied
    ),
}
IDS = torch.tensor([[1, 5, 9, 33, 8]])


@pytest.fixture
def load(tmp_path, tokenizer):
    """Saves a model, and loads it as the commands do."""

    def saved(model, **options):
        model.save_pretrained(tmp_path / "lm")
        tokenizer.save_pretrained(tmp_path / "lm")
        return sources.load_language_model(SourceArguments(model=str(tmp_path / "lm"), **options))[0]

    return saved


def build(kind: str, tied: bool):
    torch.manual_seed(0)
    if kind in WITH_IMAGES:
        return AutoModelForImageTextToText.from_config(WITH_IMAGES[kind](tie_word_embeddings=tied)).eval()
    return AutoModelForCausalLM.from_config(CAUSAL[kind](tie_word_embeddings=tied)).eval()


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("kind", [*CAUSAL, *WITH_IMAGES])
def test_there_is_a_cross_entropy_where_the_head_was_saved(load, kind, with_head, tied, trust):
    model = build(kind, tied)
    loaded = load(model if with_head else model.base_model, trust_remote_code=trust)
    assert predicts_next_token(loaded) == (with_head or tied)  # a tied head is the embedding, which was saved
    if with_head or tied:
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    sites = [resolve_site(one, "layers.1") for one in (loaded, model)]
    found, expected = (
        capture(one, [site], input_ids=IDS)[site] for one, site in zip((loaded, model), sites, strict=True)
    )
    assert torch.equal(found, expected)
    assert resolve_site(model, sites[0]) == sites[1]


def test_a_reward_model_has_no_cross_entropy_and_that_is_said(load, caplog):
    config = CAUSAL["llama"](num_labels=1, pad_token_id=0)
    assert not predicts_next_token(load(AutoModelForSequenceClassification.from_config(config)))
    assert "lacks the weights of its head (lm_head.weight): no cross-entropy is measured" in caplog.text


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("with_head", [True, False])
def test_an_encoder_predicts_no_next_token(load, with_head, trust):
    model = AutoModelForMaskedLM.from_config(BertConfig(**WIDE, vocab_size=80))
    assert not predicts_next_token(model)
    loaded = load(model if with_head else model.base_model, trust_remote_code=trust)
    assert type(loaded).__name__ == "BertModel"
    assert not predicts_next_token(loaded)


def test_of_an_encoder_decoder_the_encoder_is_read(load):
    model = AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=80, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    )
    assert not predicts_next_token(model)
    loaded = load(model.eval())
    site = resolve_site(loaded, "layers.1")
    assert site.path == "encoder.block.1"
    assert torch.equal(*(capture(one, [site], input_ids=IDS)[site] for one in (loaded, model)))


def test_an_encoder_decoder_without_an_encoder_of_its_own_is_refused(load):
    ends = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    config = BartConfig(vocab_size=80, d_model=16, encoder_ffn_dim=8, decoder_ffn_dim=8, **ends)
    with pytest.raises(ValueError, match=r"is an encoder–decoder \(bart\)"):
        load(AutoModelForSeq2SeqLM.from_config(config))


@pytest.mark.parametrize("fault", ["missing", "of another shape"])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_layers_and_embeddings_are_never_random(load, tmp_path, key, fault):
    load(build("llama", tied=False))
    weights = load_file(tmp_path / "lm" / "model.safetensors")
    old = weights.pop(key)
    if fault != "missing":
        weights[key] = old[:-1].clone()
    save_file(weights, tmp_path / "lm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"do not belong to its configuration.*{key} would be random numbers"):
        load_language_model(tmp_path / "lm")


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_who_needs_a_head_gets_the_one_that_was_saved_or_none(load, tmp_path, kind, with_head):
    model = build(kind, tied=False)
    load(model if with_head else model.base_model)
    if with_head:
        loaded, _ = load_language_model(tmp_path / "lm", needs_head=True)
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    else:
        with pytest.raises(HfMsaeError, match="was saved without a head"):
            load_language_model(tmp_path / "lm", needs_head=True)


@pytest.mark.parametrize("kind", [*CAUSAL, *WITH_IMAGES])
def test_parameters_are_counted_without_any(load, tmp_path, kind):
    model = build(kind, tied=True)
    load(model)
    config = load_language_model_config(tmp_path / "lm")
    assert count_parameters(tmp_path / "lm", config) == model.num_parameters()


def test_the_story_model_is_loaded_by_its_name():
    (model, tokenizer), (expected, _) = load_language_model(STORIES, needs_head=True), load_story_lm()
    ids = tokenizer("A little owl.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert model.config.name_or_path == STORIES
    assert not model.training


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nothing-there"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(HfMsaeError, match=f"no model at {name}"):
        load_language_model(name)


def test_the_model_to_load_is_the_given_one_then_the_saes_own():
    config = MatryoshkaSAEConfig(hidden_size=8, num_latents=64, base_model="owner/lm", base_model_revision="abc")
    assert model_to_load(config, "here") == ("owner/lm", "abc")
    assert model_to_load(config, "here", "another") == ("another", None)
    with pytest.raises(InputError, match=r"here does not say which language model it is of; give --model\."):
        model_to_load(MatryoshkaSAEConfig(hidden_size=8, num_latents=64), "here")
