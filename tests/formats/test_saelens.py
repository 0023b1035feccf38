"""SAELens' three generations of checkpoints, against formulas in float64, its own files, and its own classes.

Tests that take the fixture `sae_lens` need that package, whose versions of everything differ from ours; CI runs them
in an environment of their own.
"""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.formats import saelens
from hf_msae.formats.common import Files, FormatError
from hf_msae.sites import Site

D, F = 12, 40
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
MATRYOSHKA = {"training_architecture": "matryoshka_batchtopk"}


def x_of(seed: int = 1, tokens: int = 64, size: int = D) -> torch.Tensor:
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed)) + 0.3


def random_tensors(seed: int = 0, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights of an SAE in SAELens' orientation, with decoder rows of many norms."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(D, F, generator=generator) / D**0.5,
        "W_dec": torch.randn(F, D, generator=generator) * torch.rand(F, 1, generator=generator) * 2,
        "b_enc": torch.randn(F, generator=generator) / 5,
        "b_dec": torch.randn(D, generator=generator) / 2,
        **more,
    }


def thresholds(seed: int = 3) -> torch.Tensor:
    return torch.rand(F, generator=torch.Generator().manual_seed(seed))


def current(architecture: str, metadata: dict | None = None, **values) -> dict:
    return {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **values,
        "metadata": {"sae_lens_version": "6.20.1", **(metadata or {})},
    }


def build(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def load(folder: Path, prefix_sizes: list[int] | None = None) -> MatryoshkaSAE:
    return MatryoshkaSAE.from_saelens(folder, prefix_sizes).eval()


def pre_of(x: torch.Tensor, tensors: dict, subtract: bool = True) -> torch.Tensor:
    w = {name: tensor.double() for name, tensor in tensors.items()}
    return (x.double() - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"]


def top(pre: torch.Tensor, k: int) -> torch.Tensor:
    smallest = pre.sort(-1, descending=True).values[:, k - 1 : k]
    return pre.relu() * (pre >= smallest)


def above(pre: torch.Tensor, threshold: torch.Tensor | float) -> torch.Tensor:
    return pre.relu() * (pre > threshold)


@torch.no_grad()
def assert_computes(
    sae: MatryoshkaSAE, x: torch.Tensor, latents: torch.Tensor, out: torch.Tensor, **tolerance
) -> None:
    """And that the data tell: some latents are active, some are not."""
    encoded = sae.encode(x)
    assert 0.02 < (latents > 0).double().mean() < 0.98
    torch.testing.assert_close(encoded.double(), latents.double(), **(tolerance or TOLERANCE))
    torch.testing.assert_close(sae.decode(encoded).double(), out.double(), **(tolerance or TOLERANCE))


# The files that SAELens itself wrote


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("saelens_matryoshka_inference", [64, 128, 256, 512, 1024]),
        ("saelens_matryoshka_training", [32, 128, 512]),
    ],
)
def test_fixtures_give_the_library_s_own_numbers(library_checkpoints: Path, name: str, sizes: list[int]) -> None:
    expected = load_file(library_checkpoints / name / "expected.safetensors")
    sae = load(library_checkpoints / name)
    latents = sae.encode(expected["x"])
    torch.testing.assert_close(latents, expected["latents"], **TOLERANCE)
    assert torch.equal(latents > 0, expected["latents"] > 0)
    torch.testing.assert_close(sae.decode(latents), expected["reconstruction"], **TOLERANCE)
    assert sae.config.prefix_sizes == sizes
    assert (sae.config.k, sae.config.activation, sae.config.converted_from) == (8, "batch_topk", "SAELens")


# Layouts built by hand, as documented, against formulas in float64


@pytest.mark.parametrize("subtract", [True, False])
def test_standard(tmp_path: Path, subtract: bool) -> None:
    tensors, x = random_tensors(), x_of()
    sae = load(build(tmp_path, current("standard", apply_b_dec_to_input=subtract), tensors))
    latents = pre_of(x, tensors, subtract).relu()
    assert_computes(sae, x, latents, latents @ tensors["W_dec"].double() + tensors["b_dec"])
    assert (sae.config.activation, sae.config.prefix_sizes) == ("relu", [F])
    assert sae.config.apply_b_dec_to_input is subtract


@pytest.mark.parametrize("by_norm", [True, False])
def test_topk(tmp_path: Path, by_norm: bool) -> None:
    tensors, x = random_tensors(), x_of()
    sae = load(build(tmp_path, current("topk", k=5, rescale_acts_by_decoder_norm=by_norm), tensors))
    norms = tensors["W_dec"].double().norm(dim=1) if by_norm else torch.ones(F)
    latents = top(pre_of(x, tensors) * norms, 5)
    assert_computes(sae, x, latents, (latents / norms) @ tensors["W_dec"].double() + tensors["b_dec"])
    assert (sae.config.activation, sae.config.inference, sae.config.k) == ("topk", "topk", 5)


@pytest.mark.parametrize("logarithm", [True, False])
def test_jumprelu(tmp_path: Path, logarithm: bool) -> None:
    threshold, x = thresholds(), x_of()
    stored = {"log_threshold": threshold.log()} if logarithm else {"threshold": threshold}
    tensors = random_tensors(**stored)
    sae = load(build(tmp_path, current("jumprelu", {"training_architecture": "jumprelu", "l0": 7.5}), tensors))
    latents = above(pre_of(x, tensors), threshold.double())
    assert_computes(sae, x, latents, latents @ tensors["W_dec"].double() + tensors["b_dec"])
    assert (sae.config.activation, sae.config.k, sae.config.prefix_sizes) == ("jumprelu", 7.5, [F])


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_training_form_with_a_scalar_threshold(tmp_path: Path, architecture: str, by_norm: bool) -> None:
    tensors, x = random_tensors(topk_threshold=torch.tensor(0.4, dtype=torch.float64)), x_of()
    widths = {"matryoshka_widths": [4, 16]} if architecture == "matryoshka_batchtopk" else {}
    sae = load(build(tmp_path, current(architecture, k=5.5, rescale_acts_by_decoder_norm=by_norm, **widths), tensors))
    norms = tensors["W_dec"].double().norm(dim=1) if by_norm else torch.ones(F)
    latents = above(pre_of(x, tensors) * norms, 0.4)
    assert_computes(sae, x, latents, (latents / norms) @ tensors["W_dec"].double() + tensors["b_dec"])
    assert sae.config.prefix_sizes == ([4, 16, F] if widths else [F])
    assert (sae.config.activation, sae.config.inference, sae.config.k) == ("batch_topk", "threshold", 5.5)


def test_matryoshka_inference_form_keeps_its_nesting_from_the_metadata(tmp_path: Path) -> None:
    tensors, x = random_tensors(threshold=torch.full((F,), 0.3)), x_of()
    details = MATRYOSHKA | {"training_architecture_details": {"k": 6, "matryoshka_widths": [8, 20, F]}}
    sae = load(build(tmp_path, current("jumprelu", details), tensors))
    latents = above(pre_of(x, tensors), torch.tensor(0.3).double())
    assert_computes(sae, x, latents, latents @ tensors["W_dec"].double() + tensors["b_dec"])
    assert (sae.config.prefix_sizes, sae.config.k, sae.config.activation) == ([8, 20, F], 6, "batch_topk")
    short = sae.decode(sae.encode(x, prefix=8)).double()
    torch.testing.assert_close(short, latents[:, :8] @ tensors["W_dec"][:8].double() + tensors["b_dec"], **TOLERANCE)


def test_a_scale_of_the_activations_beside_the_checkpoint_is_folded(tmp_path: Path) -> None:
    tensors, x, scale = random_tensors(), x_of(), 2.5
    folder = build(tmp_path, current("standard", normalize_activations="expected_average_only_in"), tensors)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale, "has_whitening": False}))
    latents = pre_of(scale * x, tensors).relu()
    out = (latents @ tensors["W_dec"].double() + tensors["b_dec"]) / scale
    assert_computes(load(folder), x, latents, out)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("by_norm", [True, False])
def test_a_whitening_beside_the_checkpoint_is_folded(tmp_path: Path, subtract: bool, by_norm: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(D, generator=generator, dtype=torch.float64)
    matrix = torch.randn(D, D, generator=generator, dtype=torch.float64) / 4 + torch.eye(D)
    tensors, x = random_tensors(), x_of()
    config = current(
        "topk",
        k=4,
        rescale_acts_by_decoder_norm=by_norm,
        apply_b_dec_to_input=subtract,
        normalize_activations="covariance_whitening",
    )
    folder = build(tmp_path, config, tensors)
    whitening = {"mean": mean, "matrix": matrix, "inverse_matrix": matrix.inverse()}
    save_file({k: v.contiguous() for k, v in whitening.items()}, folder / "activation_whitening.safetensors")
    norms = tensors["W_dec"].double().norm(dim=1) if by_norm else torch.ones(F)
    latents = top(pre_of((x.double() - mean) @ matrix, tensors, subtract) * norms, 4)
    white = (latents / norms) @ tensors["W_dec"].double() + tensors["b_dec"]
    assert_computes(load(folder), x, latents, white @ matrix.inverse() + mean)


def test_firing_rates_come_along(tmp_path: Path) -> None:
    rate = torch.rand(F)
    rate[3] = 0
    folder = build(tmp_path, current("standard"), random_tensors())
    save_file({"sparsity": torch.log10(rate + 1e-10)}, folder / "sparsity.safetensors")
    read = load(folder).firing_rate
    torch.testing.assert_close(read, rate, rtol=1e-5, atol=0)
    assert read[3] == 0


def old(**values) -> dict:
    """A flat configuration of before version 6."""
    return {
        "d_in": D,
        "d_sae": F,
        "dtype": "torch.float32",
        "model_name": "gpt2-small",
        "hook_point": "blocks.8.hook_resid_pre",
        "hook_point_layer": 8,
        "hook_point_head_index": None,
        "context_size": 128,
        "normalize_activations": False,
        **values,
    }


def test_flat_configuration_of_old(tmp_path: Path) -> None:
    tensors, x = random_tensors(scaling_factor=torch.ones(F)), x_of()
    sae = load(build(tmp_path, old(prepend_bos=False), tensors))
    latents = pre_of(x, tensors).relu()
    assert_computes(sae, x, latents, latents @ tensors["W_dec"].double() + tensors["b_dec"])
    config = sae.config
    assert (config.base_model, config.site, config.context_length) == ("gpt2", "layers.8:input", 128)
    assert (config.activation, config.prefix_sizes, config.prepend_bos) == ("relu", [F], False)


def test_old_topk(tmp_path: Path) -> None:
    tensors, x = random_tensors(), x_of()
    sae = load(build(tmp_path, old(activation_fn_str="topk", activation_fn_kwargs={"k": 6}), tensors))
    latents = top(pre_of(x, tensors), 6)
    assert_computes(sae, x, latents, latents @ tensors["W_dec"].double() + tensors["b_dec"])
    assert (sae.config.inference, sae.config.k) == ("topk", 6)


def test_old_jumprelu_without_training_details_is_one_level_unless_told(tmp_path: Path) -> None:
    tensors, x = random_tensors(threshold=thresholds()), x_of()
    folder = build(tmp_path, old(architecture="jumprelu", sae_lens_training_version="3.1.0"), tensors)
    converted = saelens.read(Files(folder))
    assert converted.config["prefix_sizes"] == [F]
    assert any("prefix_sizes" in note for note in converted.notes)
    sae = load(folder, [10])
    latents = above(pre_of(x, tensors), thresholds().double())
    assert_computes(sae, x, latents, latents @ tensors["W_dec"].double() + tensors["b_dec"])
    assert sae.config.prefix_sizes == [10, F]


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_finetuned_scales_are_folded_into_the_decoder(tmp_path: Path, name: str) -> None:
    factor = thresholds() + 0.5
    tensors, x = random_tensors(**{name: factor}), x_of()
    sae = load(build(tmp_path, old(finetuning_scaling_factor=True), tensors))
    latents = pre_of(x, tensors).relu()
    assert_computes(sae, x, latents, (latents * factor.double()) @ tensors["W_dec"].double() + tensors["b_dec"])


def test_old_scaling_of_activations_needs_its_factor(tmp_path: Path) -> None:
    folder = build(tmp_path, old(normalize_activations=True), random_tensors())
    with pytest.raises(FormatError, match="norm_scaling_factor; put the factor beside"):
        load(folder)


def test_half_precision_compares_with_the_threshold_that_saelens_has(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in random_tensors().items()}
    tensors["topk_threshold"] = torch.tensor(0.4, dtype=torch.float64)
    sae = load(build(tmp_path, current("batchtopk", k=5, dtype="bfloat16"), tensors))
    assert sae.dtype == torch.bfloat16
    assert torch.equal(sae.threshold, torch.full((F,), 0.4).bfloat16().float())


# What is recognised, and what is refused


def test_recognises_its_own_and_not_sparsify_s(tmp_path: Path) -> None:
    build(tmp_path / "ours", current("standard"), random_tensors())
    sparsify = tmp_path / "sparsify"
    sparsify.mkdir()
    (sparsify / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": F, "k": 8}))
    save_file({"encoder.weight": torch.zeros(F, D)}, sparsify / "sae.safetensors")
    (tmp_path / "empty").mkdir()
    recognised = [saelens.recognises(Files(tmp_path / name)) for name in ("ours", "sparsify", "empty")]
    assert recognised == [True, False, False]
    assert saelens.recognises(Files(tmp_path))
    assert saelens.recognises(Files(tmp_path, subfolder="ours"))


def test_names_the_folders_to_choose_from(tmp_path: Path) -> None:
    build(tmp_path / "layer_3", current("standard"), random_tensors())
    with pytest.raises(FormatError, match="layer_3"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("gated", "a gate with weights of its own"),
        ("temporal", "reads the tokens before"),
        ("matching_pursuit", "in a loop"),
        ("abstopk", "may be negative"),
        ("jumprelu_skip_transcoder", "lacks .*W_skip"),
        ("lorsa", "is not known here; known are standard, topk"),
    ],
)
def test_refuses_architectures_without_equal(tmp_path: Path, architecture: str, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        load(build(tmp_path, current(architecture), random_tensors()))


def test_refuses_a_transcoder_that_calls_itself_standard(tmp_path: Path) -> None:
    places = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    with pytest.raises(FormatError, match=r"a SAELens standard that writes blocks\.1\.hook_mlp_out"):
        load(build(tmp_path, current("standard", places), random_tensors()))


@pytest.mark.parametrize(
    ("normalisation", "reason"),
    [
        ("layer_norm", "centred and divided by its own standard deviation"),
        ("constant_norm_rescale", "divided by its own norm"),
        ("expected_average_only_in", "activation_scaler.json"),
        ("covariance_whitening", "activation_whitening.safetensors"),
        ("something", "not known here"),
    ],
)
def test_refuses_normalisation_that_cannot_be_folded(tmp_path: Path, normalisation: str, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        load(build(tmp_path, current("standard", normalize_activations=normalisation), random_tensors()))


def test_refuses_files_that_do_not_belong_together(tmp_path: Path) -> None:
    tensors = random_tensors()
    cases = {
        "d_sae=41": (current("standard", d_sae=41), tensors),
        "lacks threshold": (current("jumprelu"), tensors),
        "holds threshold, which no standard": (current("standard"), tensors | {"threshold": thresholds()}),
        "W_dec should be": (current("standard"), tensors | {"W_dec": torch.zeros(F - 1, D)}),
        "threshold should be": (current("batchtopk", k=3), tensors | {"topk_threshold": torch.ones(3)}),
        "a whole number up to 40, but it is None": (current("topk"), tensors),
        "a whole number up to 40, but it is 2.5": (current("topk", k=2.5), tensors),
        "only relu and topk": (old(activation_fn_str="tanh-relu"), tensors),
        "denies it": (old(), tensors | {"scaling_factor": thresholds()}),
        "matrix should be": (current("standard", normalize_activations="covariance_whitening"), tensors),
    }
    for number, (message, (config, weights)) in enumerate(cases.items()):
        folder = build(tmp_path / str(number), config, weights)
        if message == "matrix should be":
            shapes = {"mean": (D,), "matrix": (D, D + 1), "inverse_matrix": (D, D)}
            whitening = {name: torch.zeros(shape) for name, shape in shapes.items()}
            save_file(whitening, folder / "activation_whitening.safetensors")
        with pytest.raises(FormatError, match=message):
            load(folder)


def test_refuses_a_truncated_file_and_a_missing_one(tmp_path: Path) -> None:
    weights = build(tmp_path, current("standard"), random_tensors()) / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(FormatError, match="no whole safetensors file"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(FormatError, match=r"no sae_weights\.safetensors beside it"):
        load(tmp_path)


def test_asks_for_the_sizes_of_a_matryoshka_that_does_not_record_them(tmp_path: Path) -> None:
    folder = build(tmp_path, current("jumprelu", MATRYOSHKA), random_tensors(threshold=thresholds()))
    with pytest.raises(FormatError, match="Give prefix_sizes"):
        load(folder)
    assert load(folder, [8, F]).config.prefix_sizes == [8, F]


def test_notes_what_a_user_should_know(tmp_path: Path) -> None:
    def notes(name: str, config: dict) -> str:
        return " ".join(saelens.read(Files(build(tmp_path / name, config, random_tensors()))).notes)

    assert "No L0 is recorded" in notes("k", current("standard"))
    assert "'my-model', a name of TransformerLens, is not" in notes(
        "m", current("standard", {"model_name": "my-model"})
    )
    place = {"hook_name": "blocks.3.ln1.hook_normalized", "model_name": "gpt2"}
    assert "blocks.3.ln1.hook_normalized of gpt2 is no site" in notes("s", current("standard", place))
    head = {"hook_name": "blocks.3.attn.hook_z", "hook_head_index": 2}
    assert "head 2 of blocks.3.attn.hook_z alone" in notes("h", current("standard", head))
    folded = {"model_name": "gpt2", "model_from_pretrained_kwargs": {"center_writing_weights": True, "fold_ln": False}}
    assert "loaded with center_writing_weights, by which" in notes("f", current("standard", folded))
    assert "must have its mean subtracted" in notes("o", old())
    plain = {"model_name": "gpt2", "hook_name": "blocks.3.hook_mlp_out", "l0": 5}
    assert notes("p", current("standard", plain)) == ""


# Writing


def make_sae(seed: int = 0, dtype: torch.dtype = torch.float32, **values) -> MatryoshkaSAE:
    config = MatryoshkaSAEConfig(**({"hidden_size": D, "num_latents": F, "k": 6, "prefix_sizes": [8, 20, F]} | values))
    generator = torch.Generator().manual_seed(seed)
    sae = MatryoshkaSAE(config).eval()
    with torch.no_grad():
        for tensor in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 3)
        if config.activation != "relu":
            sae.threshold.copy_(torch.rand(sae.threshold.shape, generator=generator))
        sae.firing_rate.copy_(torch.rand(F, generator=generator))
        for tensor in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
            tensor.data = tensor.data.to(dtype)
    return sae


KINDS = [
    {"activation": "batch_topk"},
    {"activation": "batch_topk", "prefix_sizes": [F]},
    {"activation": "topk"},
    {"activation": "topk", "inference": "topk"},
    {"activation": "jumprelu"},
    {"activation": "relu"},
]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
    inner=st.sets(st.integers(1, F - 1), max_size=5),
    subtract=st.booleans(),
    bos=st.booleans(),
    base_model=st.sampled_from([None, "gpt2", "google/gemma-2-2b", "someone/model"]),
    site=st.sampled_from([None, "model.layers.3:output", "model.layers.3.mlp:output", "model.layers.3:input"]),
    revision=st.sampled_from([None, "abc123"]),
)
def test_round_trip(tmp_path_factory, kind, seed, inner, subtract, bos, base_model, site, revision) -> None:
    values = {"prefix_sizes": [*sorted(inner), F]} | kind
    sae = make_sae(
        seed,
        **values,
        apply_b_dec_to_input=subtract,
        prepend_bos=bos,
        base_model=base_model,
        site=site,
        base_model_revision=revision,
        context_length=256,
    )
    folder = tmp_path_factory.mktemp("saelens") / "sae"
    saelens.write(sae, folder)
    back, x = load(folder), x_of(seed)
    assert torch.equal(back.encode(x), sae.encode(x))
    assert torch.equal(back(x).reconstruction, sae(x).reconstruction)
    torch.testing.assert_close(back.firing_rate, sae.firing_rate, rtol=1e-5, atol=0)
    for name, tensor in sae.state_dict().items():
        if name not in ("firing_rate", "max_activation", "threshold"):
            assert torch.equal(back.state_dict()[name], tensor)
    same = "k prefix_sizes activation inference apply_b_dec_to_input prepend_bos context_length base_model site"
    for name in (*same.split(), "base_model_revision"):
        assert getattr(back.config, name) == getattr(sae.config, name), name


def test_written_threshold_selects_alike_for_every_number_of_half_precision(tmp_path: Path) -> None:
    sae = make_sae(dtype=torch.bfloat16)
    saelens.write(sae, tmp_path / "sae")
    written = load_file(tmp_path / "sae" / "sae_weights.safetensors")["threshold"]
    assert written.dtype == torch.bfloat16
    # All positive numbers of bfloat16.
    numbers = torch.arange(0, 0x7F80, dtype=torch.int16).view(torch.bfloat16).unsqueeze(1)
    assert torch.equal(numbers > written, numbers.float() > sae.threshold)
    assert not torch.equal(numbers > sae.threshold.bfloat16(), numbers.float() > sae.threshold)


def test_written_configuration(tmp_path: Path) -> None:
    site = "model.layers.12:output"
    saelens.write(make_sae(base_model="google/gemma-2-2b", site=site, context_length=64), tmp_path / "known")
    config = json.loads((tmp_path / "known" / "cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"]) == ("jumprelu", D, F)
    metadata = config["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("gemma-2-2b", "blocks.12.hook_resid_post")
    assert metadata["training_architecture"] == "matryoshka_batchtopk"
    assert metadata["training_architecture_details"]["matryoshka_widths"] == [8, 20, F]
    saelens.write(make_sae(base_model="someone/model", site=site), tmp_path / "unknown")
    metadata = json.loads((tmp_path / "unknown" / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("someone/model", "model.layers.12")
    assert metadata["model_class_name"] == "AutoModelForCausalLM"


def test_writes_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="name another"):
        saelens.write(make_sae(), folder)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["notes.txt"]


# Beside SAELens' own classes


@pytest.fixture(scope="session")
def sae_lens():
    return pytest.importorskip("sae_lens", reason="needs SAELens, which CI installs in an environment of its own")


def randomised(sae, seed: int = 0):
    """The SAE with random weights and thresholds, in place."""
    with torch.no_grad():
        for name, tensor in random_tensors(seed).items():
            getattr(sae, name).copy_(tensor)
        for name, tensor in {**dict(sae.named_parameters()), **dict(sae.named_buffers())}.items():
            if name in ("threshold", "topk_threshold"):
                tensor.copy_(thresholds(seed)[0] if tensor.ndim == 0 else thresholds(seed))
    return sae


CLASSES = {
    "Standard": {},
    "TopK": {"k": 5},
    "BatchTopK": {"k": 5.5},
    "JumpReLU": {},
    "MatryoshkaBatchTopK": {"k": 5.0, "matryoshka_widths": [8, 20, F]},
}


def peer(sae_lens, kind: str, form: str, **values):
    """An SAE of SAELens with random weights."""
    name = f"{kind}{form}SAE"
    given = {"d_in": D, "d_sae": F, **CLASSES[kind], **values}
    return randomised(getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(**given)))


@torch.no_grad()
def assert_same(ours: MatryoshkaSAE, theirs, **tolerance) -> None:
    """`theirs` is in SAELens' inference form."""
    x = x_of(11).to(theirs.dtype)
    latents = theirs.encode(x)
    assert_computes(ours, x, latents, theirs.decode(latents), **tolerance)
    assert torch.equal(ours.encode(x) > 0, latents > 0)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("kind", ["Standard", "TopK", "JumpReLU"])
def test_reads_what_saelens_inference_classes_save(sae_lens, tmp_path: Path, kind: str, subtract: bool) -> None:
    theirs = peer(sae_lens, kind, "", apply_b_dec_to_input=subtract)
    theirs.save_model(tmp_path)
    assert_same(load(tmp_path), theirs)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("subtract", [True, False])
def test_reads_both_forms_that_saelens_training_classes_save(
    sae_lens, tmp_path: Path, kind: str, subtract: bool
) -> None:
    training = peer(sae_lens, kind, "Training", apply_b_dec_to_input=subtract)
    training.save_model(tmp_path / "training")
    training.save_inference_model(tmp_path / "inference")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    for form in ("training", "inference"):
        ours = load(tmp_path / form)
        assert_same(ours, theirs)
        assert ours.config.prefix_sizes == CLASSES[kind].get("matryoshka_widths", [F])
        expected = {"BatchTopK": "batch_topk", "MatryoshkaBatchTopK": "batch_topk", "Standard": "relu"}
        assert ours.config.activation == expected.get(kind, kind.lower())


@pytest.mark.parametrize("kind", CLASSES)
def test_folds_the_scaling_as_saelens_trainer_does(sae_lens, tmp_path: Path, kind: str) -> None:
    from sae_lens.training.activation_scaler import ActivationScaler

    training = peer(sae_lens, kind, "Training", normalize_activations="expected_average_only_in")
    training.save_model(tmp_path / "checkpoint")
    ActivationScaler(scaling_factor=0.7).save(str(tmp_path / "checkpoint" / "activation_scaler.json"))
    training.fold_activation_norm_scaling_factor(0.7)
    training.save_inference_model(tmp_path / "folded")
    assert_same(load(tmp_path / "checkpoint"), sae_lens.SAE.load_from_disk(tmp_path / "folded"))


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("kind", CLASSES)
def test_folds_the_whitening_as_saelens_trainer_does(sae_lens, tmp_path: Path, kind: str, subtract: bool) -> None:
    from sae_lens.training.activation_scaler import ActivationScaler

    values = {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": subtract}
    training = peer(sae_lens, kind, "Training", **values)
    training.save_model(tmp_path / "checkpoint")
    scaler = ActivationScaler()
    batches = iter([x_of(seed, 256) * torch.linspace(0.5, 2, D) for seed in range(3)])
    scaler.estimate_whitening(D, batches, n_batches_for_norm_estimate=3)
    scaler.save(str(tmp_path / "checkpoint" / "activation_scaler.json"))
    white = scaler.whitening
    training.fold_activation_whitening(white.mean, white.matrix, white.inverse_matrix)
    training.save_inference_model(tmp_path / "folded")
    assert_same(load(tmp_path / "checkpoint"), sae_lens.SAE.load_from_disk(tmp_path / "folded"))


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_reads_flat_configurations_as_saelens_does(sae_lens, tmp_path: Path, architecture: str) -> None:
    values = {"topk": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}}.get(architecture, {})
    tensors = random_tensors(threshold=thresholds()) if architecture == "jumprelu" else random_tensors()
    build(tmp_path, old(architecture=architecture, dtype="float32", **values), tensors)
    assert_same(load(tmp_path), sae_lens.SAE.load_from_disk(tmp_path))


def test_reads_half_precision_as_saelens_does(sae_lens, tmp_path: Path) -> None:
    training = peer(sae_lens, "BatchTopK", "Training", dtype="bfloat16", rescale_acts_by_decoder_norm=False)
    training.save_model(tmp_path / "training")
    training.save_inference_model(tmp_path / "inference")
    theirs, x = sae_lens.SAE.load_from_disk(tmp_path / "inference"), x_of(11).bfloat16()
    for form in ("training", "inference"):
        ours = load(tmp_path / form)
        assert torch.equal(ours.threshold, theirs.threshold.float())
        pre = ours.pre_activations(x)
        # Where a sum is rounded is each library's own, so only what is clear of the threshold must agree.
        clear = (pre.float() - ours.threshold).abs() > 0.02
        torch.testing.assert_close(ours.encode(x)[clear], theirs.encode(x)[clear], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subtract", [True, False])
def test_saelens_loads_what_is_written(sae_lens, tmp_path: Path, kind: dict, subtract: bool) -> None:
    values = {"base_model": "google/gemma-2-2b", "site": "model.layers.12:output", "context_length": 64}
    ours = make_sae(4, apply_b_dec_to_input=subtract, **kind, **values)
    ours.to_saelens(tmp_path / "sae")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert_same(ours, theirs)
    metadata = theirs.cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == ("gemma-2-2b", "blocks.12.hook_resid_post")
    assert (metadata.context_size, metadata.prepend_bos) == (64, True)
    # And SAELens, saving it again, keeps what is needed to read it back.
    theirs.save_model(tmp_path / "again")
    again = load(tmp_path / "again")
    assert_same(again, theirs)
    assert again.config.prefix_sizes == ours.config.prefix_sizes
    assert Site.parse(str(again.config.site)) == Site("model.layers.12")
