"""Sites on tiny random models of many architectures: found, captured with an early stop, replaced, left clean."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from accelerate import dispatch_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import DECODERS, ENCODERS, HEAD_DIM, PLAIN, TOKENS, build, tiny
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from hf_msae.sites import Site, SiteError, capture, check_layout, replace, resolve_site, site_width

# What stands between a sublayer and the residual stream it is added to, in architectures that normalise there.
NORMS_BEHIND = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
# The norms of architectures that normalise the residual stream itself, once the sublayer has been added.
NORMS_AFTER_ADDING = {
    "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
    "deberta-v2": ("attention.output.LayerNorm", "output.LayerNorm"),
    "distilbert": ("sa_layer_norm", "output_layer_norm"),
    "mpnet": ("attention.LayerNorm", "output.LayerNorm"),
    "roberta": ("attention.output.LayerNorm", "output.LayerNorm"),
}
ARCHITECTURES = [*DECODERS, *ENCODERS]
WITH_SUBLAYERS = [name for name in ARCHITECTURES if name != "mamba"]
INPUT_IDS = torch.tensor([[1, 5, 9, 33, 8, 60], [1, 17, 3, 3, 42, 7]])
ATTENTION_MASK = torch.ones_like(INPUT_IDS)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT_IDS, attention_mask=ATTENTION_MASK).logits


def captured(model: PreTrainedModel, *names: str) -> list[Tensor]:
    sites = [resolve_site(model, name) for name in names]
    return list(capture(model, sites, input_ids=INPUT_IDS, attention_mask=ATTENTION_MASK).values())


@contextmanager
def counted_runs(modules: list[nn.Module]) -> Iterator[list[int]]:
    """How often each module runs while the context is open."""
    runs = [0] * len(modules)

    def counter(index: int) -> Callable[..., None]:
        def count(*_: object) -> None:
            runs[index] += 1

        return count

    handles = [module.register_forward_hook(counter(index)) for index, module in enumerate(modules)]
    yield runs
    for handle in handles:
        handle.remove()


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def usual_sites(model: PreTrainedModel) -> list[Site]:
    sublayers = ["mixer"] if model.config.model_type == "mamba" else ["attn", "mlp", "mlp:input"]
    names = ["embeddings", "layers.1:input", "layers.1", *(f"layers.1.{sublayer}" for sublayer in sublayers)]
    return [resolve_site(model, name) for name in names]


# Names


@given(st.lists(st.from_regex(r"[a-z_0-9]+", fullmatch=True), min_size=1), st.sampled_from(["input", "output"]))
@settings(max_examples=30)
def test_a_site_is_read_back_from_its_text(parts: list[str], io: str):
    site = Site(".".join(parts), io)
    assert Site.parse(str(site)) == site
    assert Site.parse(site.path) == Site(site.path, "output")


@pytest.mark.parametrize("text", ["", ":output", "layers.1:", "layers.1:outputs", "a:input:output"])
def test_text_that_is_no_site_is_refused(text: str):
    with pytest.raises(SiteError, match="expected a module path, then ':input' or ':output'"):
        Site.parse(text)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_resolving_a_canonical_site_returns_it(name: str):
    model = tiny(name)
    for site in usual_sites(model):
        assert resolve_site(model, site) == site
        assert resolve_site(model, str(site)) == site
        model.get_submodule(site.path)


@pytest.mark.parametrize(
    ("name", "short", "canonical"),
    [
        ("llama", "layers.2", "model.layers.2:output"),
        ("llama", "layers.-1:input", "model.layers.2:input"),
        ("llama", "layers.-3.mlp", "model.layers.0.mlp:output"),
        ("llama", "layers.1.mlp.down_proj:input", "model.layers.1.mlp.down_proj:input"),
        ("llama", "layers.0.attn", "model.layers.0.self_attn:output"),
        ("llama", "model.norm", "model.norm:output"),
        ("llama", "norm", "model.norm:output"),
        ("llama", "embeddings", "model.embed_tokens:output"),
        ("gpt2", "layers.1", "transformer.h.1:output"),
        ("gpt_neox", "layers.1.mlp", "gpt_neox.layers.1.mlp:output"),
        ("mamba", "layers.1.mixer", "backbone.layers.1.mixer:output"),
        ("opt", "layers.1.mlp", "model.decoder.layers.1.fc2:output"),
        ("bloom", "layers.1.attn", "transformer.h.1.self_attention.dense:output"),
        ("mpt", "layers.1.mlp", "transformer.blocks.1.ffn.down_proj:output"),
        ("bert", "layers.1.attn", "bert.encoder.layer.1.attention.output.dense:output"),
        ("bert", "embeddings", "bert.embeddings.word_embeddings:output"),
        ("bert", "embeddings:output", "bert.embeddings:output"),
        ("bert", "bert.embeddings", "bert.embeddings:output"),
    ],
)
def test_names_resolve_to_canonical_paths(name: str, short: str, canonical: str):
    assert str(resolve_site(tiny(name), short)) == canonical


@given(st.integers(min_value=-3, max_value=2))
@settings(max_examples=6)
def test_negative_layers_count_from_the_end(index: int):
    assert resolve_site(tiny("gpt2"), f"layers.{index}") == Site(f"transformer.h.{index % 3}")


@pytest.mark.parametrize("index", [3, -4, 100])
def test_a_layer_out_of_range_says_how_many_there_are(index: int):
    with pytest.raises(SiteError, match=rf"GPT2LMHeadModel has 3 layers, so no 'layers.{index}.mlp'"):
        resolve_site(tiny("gpt2"), f"layers.{index}.mlp")


def test_an_unknown_site_suggests_near_names_and_short_forms():
    with pytest.raises(SiteError) as error:
        resolve_site(tiny("llama"), "model.layer.1.mlp")
    assert "LlamaForCausalLM has no site 'model.layer.1.mlp'. Did you mean 'model.layers.1.mlp'" in str(error.value)
    assert "layers.0 … layers.2, each also with .attn or .mlp; embeddings" in str(error.value)


def test_a_layer_without_attention_lists_what_it_has():
    with pytest.raises(
        SiteError, match=r"no known .attn module; its modules are norm, mixer. .*layers.1.mixer:output"
    ):
        resolve_site(tiny("mamba"), "layers.1.attn")


def test_a_layer_with_two_mlps_does_not_choose_one():
    options = {**PLAIN, "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("granitemoeshared", **options))
    with pytest.raises(SiteError, match=r"several modules that could be .mlp; .*block_sparse_moe, shared_mlp"):
        resolve_site(model, "layers.1.mlp")


def test_one_site_means_the_same_in_the_head_model_and_in_the_base_model():
    model = tiny("gpt2")
    base = cast(PreTrainedModel, model.base_model)
    in_head, in_base = resolve_site(model, "layers.1"), resolve_site(base, "layers.1")
    assert (in_head, in_base) == (Site("transformer.h.1"), Site("h.1"))
    assert resolve_site(base, in_head) == in_base
    assert resolve_site(model, in_base) == in_head
    expected = capture(model, [in_head], input_ids=INPUT_IDS)[in_head]
    assert torch.equal(capture(base, [in_head], input_ids=INPUT_IDS)[in_head], expected)
    assert torch.equal(capture(base, [in_base], input_ids=INPUT_IDS)[in_base], expected)


def test_layers_are_the_text_layers_of_a_model_that_also_sees():
    vision = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**HEAD_DIM, "model_type": "gemma3_text"},
        vision_config={**vision, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=63,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    sites = [resolve_site(model, "layers.-1"), resolve_site(model, "embeddings")]
    assert [site.path for site in sites] == ["model.language_model.layers.2", "model.language_model.embed_tokens"]
    assert [hidden.shape for hidden in capture(model, sites, input_ids=INPUT_IDS).values()] == [(2, 6, 32)] * 2


def test_an_encoder_decoder_has_no_layers_without_saying_which():
    options = {**TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2}
    config = AutoConfig.for_model("t5", **options, num_heads=4, decoder_start_token_id=0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    with pytest.raises(SiteError, match="T5ForConditionalGeneration has an encoder and a decoder"):
        resolve_site(model, "layers.1")
    encoder, decoder = resolve_site(model, "encoder.block.1"), resolve_site(model, "decoder.block.1")
    # The forward stops before the decoder could miss its own input.
    assert capture(model, [encoder], input_ids=INPUT_IDS)[encoder].shape == (2, 6, 32)
    assert site_width(model, decoder) == 32


def test_two_stacks_of_the_same_length_are_both_named():
    config = AutoConfig.for_model("xlm", **TOKENS, emb_dim=32, n_layers=3, n_heads=4)
    model = AutoModelForMaskedLM.from_config(config)
    with pytest.raises(
        SiteError, match=r"more than one stack .* = 3 modules.*transformer.attentions, .*transformer.ffns"
    ):
        resolve_site(model, "layers.1")
    assert str(resolve_site(model, "transformer.ffns.1")) == "transformer.ffns.1:output"


# Capture


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_are_the_hidden_states_of_transformers(name: str):
    model = tiny(name)
    with torch.no_grad():
        expected = model(input_ids=INPUT_IDS, attention_mask=ATTENTION_MASK, output_hidden_states=True).hidden_states
    offset = 0 if name == "mamba" else 1  # Mamba's hidden_states begin behind the first layer
    for layer, hidden in enumerate(captured(model, "layers.0", "layers.1")):
        assert torch.equal(hidden, expected[layer + offset])
    assert torch.equal(*captured(model, "layers.0", "layers.1:input"))


@pytest.mark.parametrize("name", WITH_SUBLAYERS)
def test_attention_and_mlp_are_what_a_layer_adds_to_the_stream(name: str):
    model = tiny(name)
    layer = model.get_submodule(resolve_site(model, "layers.1").path)
    names = ["layers.1:input", "layers.1.attn", "layers.1.mlp", "layers.1"]
    before, attention, mlp, after = captured(model, *names)
    assert {hidden.shape for hidden in (before, attention, mlp, after)} == {(2, 6, 32)}
    with torch.no_grad():
        if name in NORMS_AFTER_ADDING:
            first, second = (layer.get_submodule(path) for path in NORMS_AFTER_ADDING[name])
            expected = second(first(before + attention) + mlp)
        else:
            first, second = (layer.get_submodule(path) for path in NORMS_BEHIND.get(name, ("", "")))
            behind = name in NORMS_BEHIND
            expected = before + (first(attention) + second(mlp) if behind else attention + mlp)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_forward_stops_at_the_last_site(name: str):
    model = tiny(name)
    sites = [site for site in usual_sites(model) if not site.path.endswith("embeddings")]
    layers = [model.get_submodule(resolve_site(model, f"layers.{index}").path) for index in range(3)]
    check_layout(model, sites)  # which is done once
    before = hooks_on(model)
    with counted_runs([*layers, model.get_output_embeddings()]) as runs:
        hidden = capture(model, sites, input_ids=INPUT_IDS)
    assert runs == [1, 1, 0, 0]
    assert [tuple(hidden[site].shape[:2]) for site in sites] == [(2, 6)] * len(sites)
    assert hooks_on(model) == before


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_width_is_measured(name: str):
    model = tiny(name)
    assert [site_width(model, site) for site in usual_sites(model)[:4]] == [32] * 4


def test_the_width_of_an_inner_site_is_its_own():
    assert site_width(tiny("llama"), resolve_site(tiny("llama"), "layers.1.mlp.down_proj:input")) == 48


def test_sites_come_back_in_the_order_asked_for_and_equal_those_captured_alone():
    model = tiny("llama")
    names = ["layers.2.mlp", "embeddings", "layers.0", "layers.1.attn:input", "layers.0"]
    sites = [resolve_site(model, name) for name in names]
    together = capture(model, sites, input_ids=INPUT_IDS)
    assert list(together) == list(dict.fromkeys(sites))
    for site in sites:
        assert torch.equal(together[site], capture(model, [site], input_ids=INPUT_IDS)[site])


def test_padding_reaches_the_model():
    model, mask = tiny("llama"), torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    site = resolve_site(model, "layers.1")
    with torch.no_grad():
        expected = model(input_ids=INPUT_IDS, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    hidden = capture(model, [site], input_ids=INPUT_IDS, attention_mask=mask)[site]
    assert torch.equal(hidden, expected)
    assert not torch.equal(hidden, captured(model, "layers.1")[0])


def test_no_cache_is_built_unless_asked_for():
    model, seen = tiny("llama"), []
    layer = model.get_submodule("model.layers.0")
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["past_key_values"]), with_kwargs=True
    )
    site = resolve_site(model, "layers.1")
    capture(model, [site], input_ids=INPUT_IDS)
    capture(model, [site], input_ids=INPUT_IDS, use_cache=True)
    handle.remove()
    assert seen[-2] is None
    assert seen[-1].get_seq_length() == 6


def test_no_graph_is_built():
    model, seen = tiny("llama"), []
    handle = model.get_submodule("model.layers.0").register_forward_hook(
        lambda *_: seen.append(torch.is_grad_enabled())
    )
    hidden = capture(model, [resolve_site(model, "layers.1")], input_ids=INPUT_IDS)
    handle.remove()
    assert set(seen) == {False}
    assert not any(activation.requires_grad for activation in hidden.values())


def test_work_in_place_behind_a_site_does_not_reach_what_was_captured():
    model = tiny("llama")
    expected = captured(model, "layers.0")[0]
    handle = model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0].add_(1),))
    first, second = captured(model, "layers.0", "layers.1:input")
    handle.remove()
    assert torch.equal(first, expected)
    assert torch.equal(second, expected + 1)


def test_captured_activations_can_be_trained_on():
    hidden = captured(tiny("llama"), "layers.1")[0]
    assert not hidden.requires_grad
    weight = torch.ones(32, requires_grad=True)
    (hidden * weight).sum().backward()
    torch.testing.assert_close(weight.grad, hidden.sum((0, 1)))


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "opt", "modernbert"])
def test_half_precision_stays(name: str):
    model = build(name, torch.bfloat16)
    assert {hidden.dtype for hidden in captured(model, "layers.0", "layers.1.mlp")} == {torch.bfloat16}
    with replace(model, {resolve_site(model, "layers.1"): lambda hidden: hidden * 2}):
        assert logits(model).dtype == torch.bfloat16


def test_flattened_experts_are_given_back_by_sequence():
    expert_output, mlp_output = captured(tiny("mixtral"), "layers.1.mlp.experts", "layers.1.mlp")
    assert torch.equal(expert_output, mlp_output)


def test_a_module_shared_by_all_layers_is_captured_at_its_first_run():
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("albert", **PLAIN, embedding_size=32)).eval()
    with pytest.raises(SiteError, match=r"no stack of num_hidden_layers = 3 modules"):
        resolve_site(model, "layers.1")
    path = "albert.encoder.albert_layer_groups.0"
    with torch.no_grad():
        expected = model(INPUT_IDS, output_hidden_states=True).hidden_states
    assert torch.equal(captured(model, path)[0], expected[1])
    assert torch.equal(captured(model, f"{path}:input", "predictions.dense")[0], expected[0])


# Replace


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_activation_changes_no_bit_and_another_changes_the_logits(name: str):
    model = tiny(name)
    expected, before = logits(model), hooks_on(model)
    for site in usual_sites(model):
        with replace(model, {site: lambda hidden: hidden}):
            assert torch.equal(logits(model), expected), site
        with replace(model, {site: lambda hidden: hidden.clone()}):
            assert torch.equal(logits(model), expected), site
        with replace(model, {site: lambda hidden: hidden + torch.arange(float(hidden.shape[-1]))}):
            assert not torch.allclose(logits(model), expected, atol=1e-3), site
    assert torch.equal(logits(model), expected)
    assert hooks_on(model) == before


@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache_equals_generation_without(name: str):
    model: Any = tiny(name)
    sites = [
        site
        for site in usual_sites(model)
        if site.io == "output" and site.path != resolve_site(model, "embeddings").path
    ]
    direction = torch.linspace(-3, 3, 32)

    def generate(edits: dict[Site, Callable[[Tensor], Tensor]], use_cache: bool = True) -> tuple[Tensor, Tensor]:
        with replace(model, edits):
            output = model.generate(
                input_ids=INPUT_IDS,
                attention_mask=ATTENTION_MASK,
                max_new_tokens=5,
                min_new_tokens=5,
                do_sample=False,
                pad_token_id=0,
                use_cache=use_cache,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return output.sequences, torch.stack(output.logits)

    tokens, plain_logits = generate({})
    same_tokens, same_logits = generate({site: lambda hidden: hidden for site in sites})
    assert torch.equal(tokens, same_tokens)
    assert torch.equal(plain_logits, same_logits)
    edits = {site: lambda hidden: 0.5 * hidden + direction for site in sites}
    edited_tokens, edited_logits = generate(edits)
    uncached_tokens, uncached_logits = generate(edits, use_cache=False)
    assert not torch.equal(tokens, edited_tokens)
    assert torch.equal(edited_tokens, uncached_tokens)
    torch.testing.assert_close(edited_logits, uncached_logits, rtol=1e-3, atol=1e-3)


def test_in_cached_generation_each_token_is_seen_once():
    model: Any = tiny("llama")
    seen = []

    def watch(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape[1])
        return hidden

    with replace(model, {resolve_site(model, "layers.1"): watch}):
        model.generate(INPUT_IDS, attention_mask=ATTENTION_MASK, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    assert seen == [6, 1, 1, 1]


@pytest.mark.parametrize("name", ["layers.1.mlp", "layers.1.fc1:input", "layers.1:input", "embeddings"])
def test_what_was_put_at_a_site_is_what_is_found_there(name: str):
    model = tiny("opt")
    site = resolve_site(model, name)
    plain = capture(model, [site], input_ids=INPUT_IDS)[site]
    with replace(model, {site: lambda hidden: hidden.flip(0, 1)}):
        assert torch.equal(capture(model, [site], input_ids=INPUT_IDS)[site], plain.flip(0, 1))


def test_edits_nest_the_last_entered_first_and_capture_sees_them_all():
    model, site = tiny("gpt_neo"), resolve_site(tiny("gpt_neo"), "layers.1")
    plain = capture(model, [site], input_ids=INPUT_IDS)[site]
    with replace(model, {site: lambda hidden: hidden + 1}):
        with replace(model, {site: lambda hidden: hidden * 2}):
            assert torch.equal(capture(model, [site], input_ids=INPUT_IDS)[site], plain * 2 + 1)
        assert torch.equal(capture(model, [site], input_ids=INPUT_IDS)[site], plain + 1)
    assert torch.equal(capture(model, [site], input_ids=INPUT_IDS)[site], plain)


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "bert"])
def test_the_hidden_states_of_transformers_show_the_edit_whatever_ran_before(name: str):
    model = build(name)
    site = resolve_site(model, "layers.0")
    for _ in range(2):  # transformers leaves its recording hooks on the model at the first use
        plain = capture(model, [site], input_ids=INPUT_IDS)[site]
        with torch.no_grad(), replace(model, {site: lambda hidden: hidden + 1}):
            assert torch.equal(model(INPUT_IDS, output_hidden_states=True).hidden_states[1], plain + 1)


def test_gradients_reach_the_edit():
    model, vector = tiny("llama"), torch.zeros(32, requires_grad=True)
    with replace(model, {resolve_site(model, "layers.1"): lambda hidden: hidden + vector}):
        model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    model.zero_grad()
    assert vector.grad is not None
    assert vector.grad.norm() > 1e-3


def test_input_given_by_keyword_is_replaced():
    model = tiny("llama")
    site = resolve_site(model, "layers.1.attn:input")
    with replace(model, {site: torch.zeros_like}):
        assert captured(model, "layers.1.attn")[0].abs().max() == 0
    assert captured(model, "layers.1.attn")[0].abs().max() > 0


# Devices


def test_a_model_split_and_offloaded_gives_the_same_activations(tmp_path):
    split, whole = build("llama"), build("llama")
    device_map = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk"}
    rest = dict.fromkeys(["model.layers.2", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    split = dispatch_model(split, {**device_map, **rest}, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    names = ["embeddings", "layers.0", "layers.1.attn", "layers.1.mlp:input", "layers.1"]
    for stop in range(1, len(names) + 1):
        for there, here in zip(captured(split, *names[:stop]), captured(whole, *names[:stop]), strict=True):
            assert torch.equal(there, here)
    assert site_width(split, resolve_site(split, "layers.1")) == 32
    # Leaving the forward early must leave nothing loaded that accelerate keeps on disk.
    assert {weight.device.type for weight in split.model.layers[1].parameters()} == {"meta"}
    site = resolve_site(split, "layers.1.mlp")
    with replace(split, {site: lambda hidden: hidden + 1}), replace(whole, {site: lambda hidden: hidden + 1}):
        assert torch.equal(logits(split), logits(whole))


# Errors, and what is left behind


def test_no_hook_survives_an_exception():
    model = tiny("llama")
    before = hooks_on(model)
    site = resolve_site(model, "layers.1")

    def fail(hidden: Tensor) -> Tensor:
        raise RuntimeError("from the edit")

    with pytest.raises(RuntimeError, match="from the edit"), replace(model, {site: fail}):
        logits(model)
    assert hooks_on(model) == before
    with pytest.raises(ValueError, match="input_ids"):
        capture(model, [site])
    assert hooks_on(model) == before
    with (
        pytest.raises(SiteError, match=r"no site 'model\.layers\.7'"),
        replace(model, {site: fail, Site("model.layers.7"): fail}),
    ):
        pytest.fail("the context must not open")
    assert hooks_on(model) == before


def test_an_edit_may_itself_capture():
    model = tiny("llama")
    site, embeddings = resolve_site(model, "layers.0"), resolve_site(model, "embeddings")

    def add_embeddings(hidden: Tensor) -> Tensor:
        return hidden + capture(model, [embeddings], input_ids=INPUT_IDS)[embeddings]

    expected = torch.stack(captured(model, "layers.0", "embeddings")).sum(0)
    with replace(model, {site: add_embeddings}):
        assert torch.equal(captured(model, "layers.1:input")[0], expected)


@pytest.mark.parametrize(
    ("edit", "given_back"),
    [
        (lambda hidden: hidden[:, -1:], r"\(\(2, 1, 32\), torch.float32"),
        (lambda hidden: hidden.double(), r"\(\(2, 6, 32\), torch.float64"),
        (lambda hidden: hidden.to("meta"), r"device\(type='meta'\)"),
        (lambda hidden: None, "NoneType"),
        (lambda hidden: (hidden,), "tuple"),
    ],
)
def test_an_edit_that_returns_something_else_is_named(edit: Callable, given_back: str):
    model = tiny("llama")
    site = resolve_site(model, "layers.1")
    with (
        pytest.raises(SiteError, match=rf"function for model.layers.1:output returned .*{given_back}.*expected"),
        replace(model, {site: edit}),
    ):
        logits(model)


@pytest.mark.parametrize(
    ("name", "site", "message"),
    [
        ("llama", "embeddings:input", r"the input of model.embed_tokens is torch.int64 of shape \(2, 4\)"),
        (
            "qwen3",
            "model.layers.1.self_attn.q_norm",
            r"is torch.float32 of shape \(2, 4, 4, 8\), where the model was called with .* \(2, 4\)",
        ),
        ("llama", "model", r"the output of model is BaseModelOutputWithPast"),
        ("llama", "model.layers", r"did not run model.layers:output; name a module that these inputs pass through"),
    ],
)
def test_a_place_without_activations_is_refused(name: str, site: str, message: str):
    model = tiny(name)
    before = hooks_on(model)
    with pytest.raises(SiteError, match=message):
        capture(model, [resolve_site(model, site)], input_ids=INPUT_IDS)
    assert hooks_on(model) == before


def test_a_module_that_sees_the_sequence_in_pieces_is_refused():
    config = AutoConfig.for_model("bert", **PLAIN, chunk_size_feed_forward=2)
    model = AutoModelForMaskedLM.from_config(config).eval()
    with pytest.raises(
        SiteError, match=r"\(2, 2, 32\), where the model was called with \(batch, sequence\) = \(2, 4\)"
    ):
        captured(model, "layers.1.mlp")
    assert captured(model, "layers.1.attn")[0].shape == (2, 6, 32)


def test_capture_asks_for_sites():
    with pytest.raises(SiteError, match="no sites; expected at least one"):
        capture(tiny("llama"), [], input_ids=INPUT_IDS)
    with pytest.raises(SiteError, match=r"given 'layers.1'; make one with resolve_site\(model, 'layers.1'\)"):
        capture(tiny("llama"), cast(list[Site], ["layers.1"]), input_ids=INPUT_IDS)


# A real language model


def test_a_trained_model_reads_on_from_what_was_captured(stories260k):
    model, tokenizer = stories260k
    text = tokenizer("Once upon a time, there was a little dog", return_tensors="pt")
    other = tokenizer("Lily and Tom went to the park to play ba", return_tensors="pt")
    length = min(text.input_ids.shape[1], other.input_ids.shape[1])
    first, second = text.input_ids[:, :length], other.input_ids[:, :length]
    site = resolve_site(model, "layers.-1")
    moved = capture(model, [site], input_ids=second)[site]
    with torch.no_grad(), replace(model, {site: lambda hidden: moved}):
        logits_moved = model(input_ids=first).logits
    with torch.no_grad():
        assert torch.equal(logits_moved, model(input_ids=second).logits)
        assert not torch.equal(logits_moved, model(input_ids=first).logits)
    assert site_width(model, site) == 64
