"""A steering that leaves the library does what it does inside, and what cannot leave says why."""

from collections.abc import Callable

import pytest
import torch
from small_saes import rough_sae
from tiny_models import DECODERS, build, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_msae import MatryoshkaSAE
from hf_msae.errors import InputError, OutputExistsError
from hf_msae.sites import SiteError, capture, resolve_site
from hf_msae.steering import (
    Gate,
    LatentEdit,
    PrefixEdit,
    Steering,
    SteeringError,
    check_constant,
    constant_shifts,
    export_gguf,
    export_lm_eval,
    export_model,
)
from hf_msae.steering.exporting_models import _adds_to

# Of the architectures of `tests/tiny_models.py`, those in which a bias can add to the residual stream behind a layer.
WITH_BIAS = {
    "bloom",
    "cohere",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "llama",
    "mamba",
    "opt",
    "phi",
    "starcoder2",
}
WITHOUT = {
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt_oss",
    "llama4_text",
    "mistral",
    "mixtral",
    "mpt",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "stablelm",
}
STEERING = Steering([LatentEdit(5, 3.0), LatentEdit(9, -20.0, units="absolute"), LatentEdit(3, 0.0, "add", "norm")])


def tokens_of(model: PreTrainedModel) -> torch.Tensor:
    """Two texts with a BOS and an EOS in them."""
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (2, 9), generator=torch.manual_seed(5))
    ids[:, 0], ids[0, 4] = 1, 2
    return ids


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens_of(model), attention_mask=torch.ones(2, 9, dtype=torch.long)).logits


def inside(model: PreTrainedModel, saes: object, steering: Steering) -> torch.Tensor:
    """The logits under the context manager, on special tokens as on any, as an exported shift acts."""
    with steering.on(model, saes, special_ids=()):
        return logits_of(model)


def test_all_tiny_architectures_are_tried() -> None:
    assert set(DECODERS) == WITH_BIAS | WITHOUT
    assert not WITH_BIAS & WITHOUT


@pytest.mark.parametrize("architecture", sorted(WITH_BIAS))
def test_the_exported_model_gives_the_steered_logits(architecture, make_sae, tmp_path) -> None:
    model = tiny(architecture)
    sae = make_sae(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    folder = export_model(model, sae, STEERING, tmp_path / "steered")
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = inside(model, sae, STEERING)
    assert torch.allclose(logits_of(loaded), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits_of(model), expected, atol=1e-2)
    assert type(loaded) is type(model)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in before.items())


@pytest.mark.parametrize(
    ("path", "adds"),
    [
        ("model.layers.1", True),
        ("model.layers.1.mlp", True),
        ("model.layers.1.mlp.down_proj", True),
        ("model.layers.1.self_attn.o_proj", False),  # the MLP reads it, too
        ("model.layers.1.mlp.up_proj", False),  # of another width
        ("model.layers.1.input_layernorm", False),
        ("model.layers.0.mlp.down_proj", False),
        ("model.layers.2.mlp.down_proj", False),  # behind the site
    ],
)
def test_what_adds_at_a_site_is_what_goes_nowhere_else(path, adds, llama) -> None:
    assert _adds_to(llama, path, resolve_site(llama, "layers.1")) == adds


@pytest.mark.parametrize("architecture", sorted(WITHOUT))
def test_an_architecture_without_such_a_bias_is_refused_by_name(architecture, make_sae, tmp_path) -> None:
    model = tiny(architecture)
    words = rf"{type(model).__name__} has no bias that adds a vector to [\w.]*(layers|blocks)\.1:output"
    with pytest.raises(SteeringError, match=words):
        export_model(model, make_sae(model), STEERING, tmp_path / "steered")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("site", ["layers.1.mlp", "layers.1.attn", "layers.2:input", "layers.1.mlp.up_proj"])
def test_other_sites_have_their_own_bias(site, llama, make_sae, tmp_path) -> None:
    sae = make_sae(llama, site)
    loaded = AutoModelForCausalLM.from_pretrained(export_model(llama, sae, STEERING, tmp_path / "steered")).eval()
    assert torch.allclose(logits_of(loaded), inside(llama, sae, STEERING), atol=1e-4, rtol=1e-4)


def test_sublayers_before_a_norm_can_be_shifted_where_the_residual_stream_cannot(make_sae, tmp_path) -> None:
    """Gemma 2 has a bias at the projection of its attention, and a norm behind it."""
    model = tiny("gemma2")
    sae = make_sae(model, "layers.1.attn")
    loaded = AutoModelForCausalLM.from_pretrained(export_model(model, sae, STEERING, tmp_path / "steered")).eval()
    assert torch.allclose(logits_of(loaded), inside(model, sae, STEERING), atol=1e-4, rtol=1e-4)


def test_several_saes_at_one_site_and_at_two(llama, make_sae, tmp_path) -> None:
    saes = {"a": make_sae(llama), "b": make_sae(llama, seed=1), "c": make_sae(llama, "layers.0.attn")}
    steering = Steering([LatentEdit(5, 2.0, sae="a"), LatentEdit(6, 3.0, sae="b"), LatentEdit(7, 3.0, sae="c")])
    loaded = AutoModelForCausalLM.from_pretrained(export_model(llama, saes, steering, tmp_path / "steered")).eval()
    assert torch.allclose(logits_of(loaded), inside(llama, saes, steering), atol=1e-4, rtol=1e-4)
    assert len(constant_shifts(llama, saes, steering)) == 2


def test_an_exported_model_can_be_exported_again(llama, make_sae, tmp_path) -> None:
    sae = make_sae(llama)
    once = AutoModelForCausalLM.from_pretrained(export_model(llama, sae, STEERING, tmp_path / "once")).eval()
    back = Steering([LatentEdit(5, -3.0), LatentEdit(9, 20.0, units="absolute")])
    again = AutoModelForCausalLM.from_pretrained(export_model(once, sae, back, tmp_path / "again")).eval()
    assert torch.allclose(logits_of(again), logits_of(llama), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mistral"])
def test_half_precision_changes_no_answer(architecture, make_sae, tmp_path) -> None:
    model = build(architecture, torch.bfloat16)
    sae = make_sae(model)
    if architecture in WITHOUT:
        with pytest.raises(SteeringError, match="has no bias that adds"):
            export_model(model, sae, STEERING, tmp_path / "steered")
        return
    loaded = AutoModelForCausalLM.from_pretrained(export_model(model, sae, STEERING, tmp_path / "steered")).eval()
    assert loaded.dtype == torch.bfloat16
    expected = inside(model, sae, STEERING)
    changed = (logits_of(model).float() - expected.float()).norm()
    assert (logits_of(loaded).float() - expected.float()).norm() < 0.1 * changed


def test_the_folder_has_a_tokenizer_and_says_what_it_is(lm, tokenizer, make_sae, tmp_path) -> None:
    sae = make_sae(lm, "layers.0")
    steering = Steering([LatentEdit(5, 3.0)], name="owls", description="More owls.")
    folder = export_model(lm, sae, steering, tmp_path / "steered", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(folder)("w1 w2").input_ids == tokenizer("w1 w2").input_ids
    card = (folder / "README.md").read_text()
    assert "| `model.layers.0:output` | `model.layers.0.mlp.down_proj.bias` |" in card
    assert "More owls." in card
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 2


@pytest.mark.parametrize("value", [LatentEdit(5, 3.0), LatentEdit(5, 3.0, units="absolute")])
def test_the_shift_is_what_the_context_adds(value, llama, make_sae) -> None:
    sae = make_sae(llama)
    ((site, shift),) = constant_shifts(llama, sae, Steering([value])).items()
    plain = capture(llama, [site], input_ids=tokens_of(llama))[site]
    with Steering([value]).on(llama, sae, special_ids=()):
        steered = capture(llama, [site], input_ids=tokens_of(llama))[site]
    assert torch.allclose(steered - plain, shift.expand_as(plain), atol=1e-5)


@pytest.mark.parametrize(
    ("steering", "said"),
    [
        (Steering([LatentEdit(5, 1.0, "clamp")]), "method='clamp' of latent 5 adds depends on the latent's own"),
        (Steering([LatentEdit(5, method="ablate")]), "method='ablate' of latent 5"),
        (Steering([LatentEdit(5, 2.0), LatentEdit(6, 2.0, "scale")]), "method='scale' of latent 6"),
        (Steering([LatentEdit(5, 1.0, units="norm")]), "units='norm' of latent 5 make the shift as long as each"),
        (Steering([LatentEdit(5, 1.0, when=Gate(6))]), "a gate lets the edit of latent 5 act on some tokens only"),
        (Steering([PrefixEdit(1)]), "keeping level 1 takes away depends on which latents are active"),
        (Steering([LatentEdit(5, 1.0)], "generated"), "acts on positions='generated' only"),
        (Steering([LatentEdit(5, 1.0)], slice(2, 5)), r"acts on positions=slice\(2, 5, None\) only"),
        (Steering([], name="none"), "'none' changes nothing, so there is nothing to export"),
        (Steering([LatentEdit(5, 0.0), LatentEdit(6, 1.0, "scale")]), "changes nothing"),
    ],
)
def test_what_is_no_constant_shift_is_refused_with_the_edit_and_the_reason(
    steering, said, llama, make_sae, tmp_path
) -> None:
    sae = make_sae(llama)
    with pytest.raises(SteeringError, match=said):
        check_constant(steering)
    for export, name in ((export_model, "folder"), (export_gguf, "a.gguf"), (export_lm_eval, "a.pt")):
        with pytest.raises(SteeringError, match=said):
            export(llama, sae, steering, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused(llama, make_sae, tmp_path) -> None:
    sae, steering = make_sae(llama), Steering([LatentEdit(5, 1.0)])
    with pytest.raises(SteeringError, match="there is no SAE 'b'"):
        export_model(llama, sae, Steering([LatentEdit(5, 1.0, sae="b")]), tmp_path / "x")
    with pytest.raises(SteeringError, match="latent 48 is not there"):
        export_gguf(llama, sae, Steering([LatentEdit(48, 1.0)]), tmp_path / "x.gguf")
    embeddings = make_sae(llama, "embeddings")
    for export, name in ((export_model, "x"), (export_gguf, "x.gguf")):
        with pytest.raises(SteeringError, match=r"embed_tokens:output"):
            export(llama, embeddings, steering, tmp_path / name)
    with pytest.raises(SiteError, match="reads activations of 6 dimensions"):
        export_model(llama, rough(), steering, tmp_path / "x")
    for export, name in ((export_gguf, "x.gguf"), (export_lm_eval, "x.pt")):
        with pytest.raises(SteeringError, match="the steering's vector has 6 dimensions"):
            export(llama, rough(), steering, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def rough() -> MatryoshkaSAE:
    """An SAE of another model, whose activations have 6 dimensions."""
    sae = rough_sae(0)
    sae.config.site = "layers.1"
    sae.max_activation.fill_(1.0)
    return sae


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_models_that_are_not_whole_are_refused(make_sae, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    model, steering = build("llama"), Steering([LatentEdit(5, 1.0)])
    sae = make_sae(model)
    with pytest.raises(SteeringError, match=r"call model\.eval\(\)"):
        export_model(model.train(), sae, steering, tmp_path / "x")
    with pytest.raises(SteeringError, match="load it without offloading"):
        export_model(outline(model).eval(), sae, steering, tmp_path / "x")
    get_peft_model(model.eval(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(SteeringError, match=r"an adapter is in it\. Give the whole model"):
        export_model(model, sae, steering, tmp_path / "x")


def test_nothing_is_written_over(llama, make_sae, tmp_path) -> None:
    sae, steering = make_sae(llama), Steering([LatentEdit(5, 1.0)])
    for export, name in ((export_model, "folder"), (export_gguf, "a.gguf"), (export_lm_eval, "a.pt")):
        export(llama, sae, steering, tmp_path / name)
        with pytest.raises(OutputExistsError, match="name another"):
            export(llama, sae, steering, tmp_path / name)
    with pytest.raises(InputError, match=r"from \.pt or \.pth files, got .*a\.bin"):
        export_lm_eval(llama, sae, steering, tmp_path / "a.bin")


def outline(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its weights, as the command loads it where a file needs none."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model.config)


def shifted(model: PreTrainedModel, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits where plain hooks add vectors to what modules return, as other programs do."""

    def adding(vector: torch.Tensor) -> Callable[..., object]:
        def hook(module: object, inputs: object, output: object) -> object:
            return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

        return hook

    handles = [model.get_submodule(path).register_forward_hook(adding(vector)) for path, vector in vectors.items()]
    try:
        return logits_of(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen3"])
@pytest.mark.parametrize("site", ["layers.1", "layers.2:input"])
def test_a_control_vector_is_read_back_as_the_same_shift(architecture, site, make_sae, tmp_path) -> None:
    """As llama.cpp reads it: direction.N is added to the output of layer N, counted from 0, and there is no N = 0."""
    from gguf import GGUFReader

    model = tiny(architecture)
    sae = make_sae(model, site)
    reader = GGUFReader(export_gguf(outline(model), sae, STEERING, tmp_path / "a.gguf"))
    contents = {name: field.contents() for name, field in reader.fields.items()}
    assert contents["general.architecture"] == "controlvector"
    assert contents["controlvector.model_hint"] == model.config.model_type
    assert contents["controlvector.layer_count"] == 2
    directions = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert {name: vector.shape for name, vector in directions.items()} == {
        "direction.1": (32,),
        "direction.2": (32,),
    }
    assert not directions["direction.2"].any()
    (shift,) = constant_shifts(model, sae, STEERING).values()
    assert torch.equal(directions["direction.1"], shift)
    layer = resolve_site(model, "layers.1").path
    found = shifted(model, {layer: directions["direction.1"]})
    assert torch.allclose(found, inside(model, sae, STEERING), atol=1e-4, rtol=1e-4)


def test_llama_cpp_has_no_place_before_the_second_layer(llama, make_sae, tmp_path) -> None:
    for site in ("layers.0", "layers.0:input", "layers.1.mlp"):
        with pytest.raises(SteeringError, match=r"to the output of layers 1 … 2, and the steering acts at .*layers\."):
            export_gguf(llama, make_sae(llama, site), Steering([LatentEdit(5, 1.0)]), tmp_path / "a.gguf")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen3"])
@pytest.mark.parametrize("site", ["layers.0", "layers.1.mlp", "layers.2:input"])
def test_a_file_for_lm_eval_is_read_back_as_the_same_shift(architecture, site, make_sae, tmp_path) -> None:
    """As its documentation has it: by module of the base model, a vector times a coefficient, and no bias."""
    model = tiny(architecture)
    sae = make_sae(model, site)
    path = export_lm_eval(outline(model), sae, STEERING, tmp_path / "a.pt")
    vectors = {}
    for hookpoint, info in torch.load(path, weights_only=True).items():
        assert (info["action"], info["bias"], info["head_index"]) == ("add", None, None)
        assert hookpoint in dict(model.base_model.named_modules())
        vectors[f"{model.base_model_prefix}.{hookpoint}"] = info["steering_vector"] * info["steering_coefficient"]
    found = shifted(model, vectors)
    assert torch.allclose(found, inside(model, sae, STEERING), atol=1e-4, rtol=1e-4)


def test_lm_eval_hooks_what_modules_return(llama, make_sae, tmp_path) -> None:
    with pytest.raises(SteeringError, match=r"adds to what modules return, and the steering acts at .*mlp:input"):
        export_lm_eval(llama, make_sae(llama, "layers.1.mlp:input"), Steering([LatentEdit(5, 1.0)]), tmp_path / "a.pt")
