"""Transcoders of other libraries, in and out: by the published forward of each, and by the peers where they are."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.errors import InputError
from hf_msae.formats import circuit_tracer, saelens, sparsify
from hf_msae.formats.common import Files, FormatError

D, F, OUT = 12, 40, 7
MLP = {"site": "model.layers.1.mlp:input", "site_out": "model.layers.1.mlp:output"}
KINDS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def x_of(tokens: int = 50) -> Tensor:
    return draw(tokens, D, seed=9)


def tensors(output: int = OUT, skip: bool = False, threshold: bool = False) -> dict[str, Tensor]:
    """In SAELens' orientation, and Gemma Scope's."""
    found = {
        "W_enc": draw(D, F, seed=0),
        "W_dec": draw(F, output, seed=1),
        "b_enc": 0.1 * draw(F, seed=2),
        "b_dec": draw(output, seed=3),
    }
    found |= {"W_skip": 0.3 * draw(output, D, seed=4)} if skip else {}
    return found | ({"threshold": 1 + draw(F, seed=5).abs()} if threshold else {})


def forward(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction, as the papers have them."""
    pre = x @ weights["W_enc"] + weights["b_enc"]
    latents = pre.relu() * (pre > weights.get("threshold", torch.zeros(F)))
    skip = x @ weights["W_skip"].T if "W_skip" in weights else 0
    return latents, latents @ weights["W_dec"] + weights["b_dec"] + skip


@torch.no_grad()
def assert_computes(sae: MatryoshkaSAE, x: Tensor, latents: Tensor, reconstruction: Tensor) -> None:
    found = sae.encode(x)
    assert 0 < (latents != 0).float().mean() < 1
    torch.testing.assert_close(found, latents, atol=1e-5, rtol=1e-5)
    decoded = sae.decode(found, hidden_states=x)
    torch.testing.assert_close(decoded, reconstruction, atol=1e-5, rtol=1e-5)


def make(skip: bool = True, output: int | None = None, seed: int = 0, **config) -> MatryoshkaSAE:
    torch.manual_seed(seed)
    shape = {"hidden_size": D, "num_latents": F, "prefix_sizes": [8, F], "k": 5, "base_model": "org/lm", **MLP}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**{**shape, "hidden_size_out": output, "skip": skip, **config})).eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        sae.threshold.copy_(torch.rand(F) + 0.5 if sae.config.activation != "relu" else torch.zeros(F))
        sae.max_activation.uniform_(1, 2)
    return sae


# Gemma Scope


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_gemma_scope_2_with_and_without_an_affine_skip(tmp_path, skip, recorded, imported):
    weights = tensors(D, skip, threshold=True)
    folder = tmp_path / f"gemma-scope-2-1b-pt/transcoder_all/layer_7_width_16k_l0_small{'_affine' * skip}"
    folder.mkdir(parents=True)
    stored = {name.lower(): tensor for name, tensor in weights.items() if name != "W_skip"}
    stored |= {"affine_skip_connection": weights["W_skip"].T.contiguous()} if skip else {}
    save_file(stored, folder / "params.safetensors")
    if recorded:
        hooks = {"hf_hook_point_in": "model.layers.7.pre_feedforward_layernorm.output", "affine_connection": skip}
        hooks["hf_hook_point_out"] = "model.layers.7.post_feedforward_layernorm.output"
        content = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "l0": 20, **hooks}
        (folder / "config.json").write_text(json.dumps(content))
    sae = imported(folder, "gemma_scope", [8, F])
    assert_computes(sae, x_of(), *forward(weights, x_of()))
    config = sae.config
    assert (config.base_model, config.skip, config.prefix_sizes) == ("google/gemma-3-1b-pt", skip, [8, F])
    assert config.site == "layers.7.pre_feedforward_layernorm:output"
    assert config.site_out == "layers.7.post_feedforward_layernorm:output"


def test_gemma_scope_2_says_where_skip_and_configuration_differ(tmp_path, imported):
    folder = tmp_path / "transcoder/layer_7_width_16k_l0_small"
    folder.mkdir(parents=True)
    save_file({k.lower(): v for k, v in tensors(D, threshold=True).items()}, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps({"affine_connection": True}))
    with pytest.raises(FormatError, match=r"affine_connection=True, but params\.safetensors says False"):
        imported(folder, "gemma_scope")


def test_gemma_scope_1(tmp_path, imported):
    weights = tensors(D, threshold=True)
    folder = tmp_path / "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_22"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    sae = imported(folder, "gemma_scope")
    assert_computes(sae, x_of(), *forward(weights, x_of()))
    assert (sae.config.base_model, sae.config.k) == ("google/gemma-2-2b", 22)
    assert sae.config.site_out == "layers.3.post_feedforward_layernorm:output"


# SAELens


def written_by_saelens(folder: Path, kind: str, **change) -> dict[str, Tensor]:
    weights = tensors(OUT, "skip" in kind, "jumprelu" in kind)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "sae_weights.safetensors")
    metadata = {"sae_lens_version": "6.54.0", "model_name": "gpt2-small", "hook_name": "blocks.1.ln2.hook_normalized"}
    metadata |= {"hook_name_out": "blocks.1.hook_mlp_out", "hf_hook_name": "transformer.h.1.mlp.input"}
    settings = {"architecture": kind, "d_in": D, "d_sae": F, "d_out": OUT, "apply_b_dec_to_input": False}
    settings |= {"normalize_activations": "none", "dtype": "float32", "metadata": metadata, **change}
    (folder / "cfg.json").write_text(json.dumps(settings))
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_saelens_four_kinds(tmp_path, kind, imported):
    weights = written_by_saelens(tmp_path, kind)
    sae = imported(tmp_path, "saelens")
    assert_computes(sae, x_of(), *forward(weights, x_of()))
    assert (sae.config.skip, sae.config.hidden_size_out) == ("skip" in kind, OUT)
    assert sae.config.activation == ("jumprelu" if "jumprelu" in kind else "relu")
    assert (sae.config.site, sae.config.site_out) == ("transformer.h.1.mlp:input", "layers.1.mlp")


def test_saelens_what_does_not_fit_is_refused(tmp_path, imported):
    written_by_saelens(tmp_path / "a", "transcoder", d_out=OUT + 1)
    with pytest.raises(FormatError, match=f"d_out={OUT + 1}, but sae_weights.safetensors says {OUT}"):
        imported(tmp_path / "a", "saelens")
    written_by_saelens(tmp_path / "b", "transcoder", normalize_activations="expected_average_only_in")
    with pytest.raises(FormatError, match="only transcoders of raw activations are read"):
        imported(tmp_path / "b", "saelens")


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batch_topk"])
@pytest.mark.parametrize("skip", [False, True])
def test_saelens_round_trip_keeps_nesting_sites_and_maxima(tmp_path, activation, skip, imported):
    sae = make(skip, OUT, activation=activation)
    saelens.write(sae, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "cfg.json").read_text())
    kind = f"{'' if activation == 'relu' else 'jumprelu_'}{'skip_' * skip}transcoder"
    assert (settings["architecture"], settings["d_out"]) == (kind, OUT)
    assert settings["metadata"]["hf_hook_name_out"] == MLP["site_out"]
    back = imported(tmp_path / "out", "saelens")
    ours, theirs = sae.config.to_dict(), back.config.to_dict()
    same = ("site", "site_out", "skip", "hidden_size_out", "prefix_sizes", "activation", "k", "base_model")
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert torch.equal(back.max_activation, sae.max_activation)
    with torch.no_grad():
        torch.testing.assert_close(back.reconstruct_levels(x_of()), sae.reconstruct_levels(x_of()))


def test_saelens_has_no_topk_transcoder(tmp_path):
    with pytest.raises(InputError, match="SAELens has no transcoders that keep the k largest"):
        saelens.write(make(activation="topk", inference="topk"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.peer
@pytest.mark.slow  # importing SAELens starts git
@pytest.mark.parametrize("kind", KINDS)
def test_saelens_own_classes_compute_the_same(tmp_path, kind, imported):
    sae_lens = pytest.importorskip("sae_lens", reason="needs SAELens, which CI installs in an environment of its own")
    name = {"transcoder": "Transcoder", "skip_transcoder": "SkipTranscoder"}
    name |= {"jumprelu_transcoder": "JumpReLUTranscoder", "jumprelu_skip_transcoder": "JumpReLUSkipTranscoder"}
    options = {"d_in": D, "d_sae": F, "d_out": OUT, "apply_b_dec_to_input": False}
    theirs = getattr(sae_lens, name[kind])(getattr(sae_lens, f"{name[kind]}Config")(**options))
    with torch.no_grad():
        for key, tensor in tensors(OUT, "skip" in kind, "jumprelu" in kind).items():
            getattr(theirs, key).copy_(tensor)
    theirs.save_model(tmp_path / "theirs")
    assert_computes(imported(tmp_path / "theirs", "saelens"), x_of(), theirs.encode(x_of()), theirs(x_of()))
    ours = make("skip" in kind, OUT, activation="jumprelu" if "jumprelu" in kind else "relu")
    saelens.write(ours, tmp_path / "ours")
    read = sae_lens.SAE.load_from_disk(str(tmp_path / "ours"))
    assert type(read).__name__ == name[kind]
    assert_computes(ours, x_of(), read.encode(x_of()), read(x_of()))


# sparsify


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_transcode(tmp_path, skip, imported):
    weights = tensors(D, skip)
    folder = tmp_path / "layers.2.mlp"
    folder.mkdir()
    stored = {"encoder.weight": weights["W_enc"].T.contiguous(), "encoder.bias": weights["b_enc"]}
    stored |= {name: weights[name] for name in ("W_dec", "b_dec", "W_skip") if name in weights}
    save_file(stored, folder / "sae.safetensors")
    cfg = {"num_latents": F, "k": 6, "transcode": True, "skip_connection": skip, "d_in": D, "activation": "topk"}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    sae, x = imported(folder, "sparsify"), x_of()
    pre = (x @ weights["W_enc"] + weights["b_enc"]).relu()
    latents = pre * (pre >= pre.topk(6).values[:, -1:])
    expected = latents @ weights["W_dec"] + weights["b_dec"] + (x @ weights["W_skip"].T if skip else 0)
    assert_computes(sae, x, latents, expected)
    assert (sae.config.site, sae.config.site_out) == ("layers.2.mlp:input", "layers.2.mlp:output")


@pytest.mark.peer
@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_itself_computes_the_same(tmp_path, skip, imported):
    peer = pytest.importorskip("sparsify", reason="needs the package eai-sparsify")
    torch.manual_seed(0)
    coder = peer.SparseCoder(D, peer.SparseCoderConfig(num_latents=F, k=6, transcode=True, skip_connection=skip))
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    coder.save_to_disk(tmp_path / "layers.1.mlp")
    assert_sparsify_agrees(imported(tmp_path / "layers.1.mlp", "sparsify"), coder)
    ours = make(skip, activation="topk", inference="topk")
    sparsify.write(ours, tmp_path / "layers.3.mlp")
    assert_sparsify_agrees(ours, peer.SparseCoder.load_from_disk(tmp_path / "layers.3.mlp"))


def assert_sparsify_agrees(sae: MatryoshkaSAE, coder) -> None:
    x = x_of()
    with torch.no_grad():
        values, places, _ = coder.encode(x)
        latents = torch.zeros(len(x), F).scatter(-1, places, values)
        assert_computes(sae, x, latents, coder(x).sae_out)


def test_sparsify_writes_one_width_only(tmp_path):
    with pytest.raises(InputError, match="read and write one width, and this reads 12 and writes 7"):
        sparsify.write(make(output=OUT, activation="topk", inference="topk"), tmp_path / "out")


# circuit-tracer


def circuit_tracer_forward(folder: Path, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """What its SingleLayerTranscoder computes of a file, by the names that its loader looks for."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    state = load_file(folder / f"layer_{layer}.safetensors")
    assert config["model_kind"] == "transcoder_set"
    assert state.keys() <= {"W_enc", "W_dec", "b_enc", "b_dec", "W_skip", "activation_function.threshold"}
    pre = torch.nn.functional.linear(x, state["W_enc"], state["b_enc"])
    if config.get("activation") == "topk":
        latents = torch.zeros_like(pre).scatter(-1, *reversed(pre.topk(config["k"], dim=-1)))
    elif config.get("activation") == "relu":
        latents = pre.relu()
    else:
        latents = pre * (pre > state["activation_function.threshold"])
    skip = x @ state["W_skip"].T if "W_skip" in state else 0
    return latents, latents @ state["W_dec"] + state["b_dec"] + skip


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("form", ["batch_topk", "jumprelu", "relu", "topk"])
def test_circuit_tracer_reads_what_is_written(tmp_path, form, skip):
    options = {"activation": form, "inference": "topk" if form == "topk" else "threshold"}
    sae = make(skip, **options)
    circuit_tracer.write(sae, tmp_path / "out")
    assert_computes(sae, x_of(), *circuit_tracer_forward(tmp_path / "out", 1, x_of()))
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("mlp.hook_in", "mlp.hook_out")


def test_circuit_tracer_takes_all_layers_in_one_folder(tmp_path):
    layers = [
        make(seed=layer, site=f"model.layers.{layer}.mlp:input", site_out=f"model.layers.{layer}.mlp:output")
        for layer in (0, 1)
    ]
    circuit_tracer.write_set(layers, tmp_path / "out")
    for layer, sae in enumerate(layers):
        assert_computes(sae, x_of(), *circuit_tracer_forward(tmp_path / "out", layer, x_of()))
    for wrong in ([layers[0], layers[0]], [layers[0], make(activation="topk", inference="topk")]):
        with pytest.raises(InputError, match="one transcoder for each layer, all alike"):
            circuit_tracer.write_set(wrong, tmp_path / "wrong")


@pytest.mark.parametrize(
    "change", [{"hidden_size_out": OUT}, {"site": "model.layers.0:output"}, {"site_out": "model.layers.2.mlp:output"}]
)
def test_circuit_tracer_replaces_mlps_only(tmp_path, change):
    with pytest.raises(InputError, match="circuit-tracer replaces MLPs by transcoders of one width"):
        circuit_tracer.write(make(**change), tmp_path / "out")
    plain = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=D, num_latents=F, k=5, site="layers.1.mlp"))
    with pytest.raises(InputError, match="circuit-tracer replaces MLPs"):
        circuit_tracer.write(plain, tmp_path / "out")


# Files of whole releases: one layer chosen by its file


QWEN = "SAE-Res-Qwen3-1.7B-Base-W1K-L0_50"


def qwen_weights(seed: int = 0) -> dict[str, Tensor]:
    return {
        "W_enc": draw(1024, D, seed=seed),
        "W_dec": draw(D, 1024, seed=seed + 1),
        "b_enc": 0.1 * draw(1024, seed=seed + 2),
        "b_dec": draw(D, seed=seed + 3),
    }


def save_qwen(folder: Path, layers: tuple[int, ...] = (0, 2, 10)) -> Path:
    folder.mkdir(parents=True)
    for layer in layers:
        torch.save(qwen_weights(layer), folder / f"layer{layer}.sae.pt")
    return folder


def qwen_forward(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    pre = x @ weights["W_enc"].T + weights["b_enc"]
    values, places = pre.topk(50)
    latents = torch.zeros_like(pre).scatter(-1, places, values)
    return latents, latents @ weights["W_dec"].T + weights["b_dec"]


def test_qwen_scope_by_its_layer_from_a_folder_and_from_a_repo(tmp_path, hub):
    folder = save_qwen(tmp_path / QWEN)
    repo = f"{hub.user}/{QWEN}"
    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=folder)
    for source in (folder, repo):
        sae = MatryoshkaSAE.from_pretrained(source, subfolder="layer10.sae.pt")
        assert_computes(sae, x_of(), *qwen_forward(qwen_weights(10), x_of()))
        config = sae.config
        assert (config.k, config.activation, config.inference) == (50, "topk", "topk")
        assert (config.base_model, config.site) == ("Qwen/Qwen3-1.7B-Base", "layers.10:output")
        assert not config.apply_b_dec_to_input
        with pytest.raises(FormatError, match=r"of 3 layers; choose .*: layer0\.sae\.pt, layer2\.sae\.pt, layer10"):
            MatryoshkaSAE.from_pretrained(source)


def test_qwen_scope_of_one_layer_needs_no_choice(tmp_path):
    sae = MatryoshkaSAE.from_pretrained(save_qwen(tmp_path / QWEN, (4,)))
    assert sae.config.site == "layers.4:output"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mine", {}, "is not named as Qwen-Scope's repos are"),
        (QWEN.replace("Res", "Attn"), {}, "is of the place 'Attn'; only 'Res'"),
        (QWEN.replace("W1K", "W2K"), {}, "num_latents .*=2048, but layer0.sae.pt says 1024"),
        (QWEN, {"W_gate": torch.zeros(2)}, "holds W_gate, which no SAE of Qwen-Scope has"),
        (QWEN, {"b_enc": torch.zeros(3)}, "do not belong together"),
        (QWEN, {"W_enc": print}, "is a pickle that would run"),
    ],
)
def test_qwen_scope_refuses_what_is_unknown(tmp_path, name, change, message):
    folder = save_qwen(tmp_path / name, (0,))
    torch.save(qwen_weights() | change, folder / "layer0.sae.pt")
    with pytest.raises(FormatError, match=message):
        MatryoshkaSAE.from_pretrained(folder)


@pytest.fixture
def save_goodfire(tmp_path) -> Callable[..., Path]:
    def save(name: str = "Llama-3.1-8B-Instruct-SAE-l19.pth") -> Path:
        weights = {"encoder_linear.weight": draw(F, D, seed=0), "decoder_linear.weight": draw(D, F, seed=1)}
        weights |= {"encoder_linear.bias": draw(F, seed=2), "decoder_linear.bias": draw(D, seed=3)}
        torch.save(weights, tmp_path / name)
        return tmp_path / name

    return save


def test_goodfire_by_its_file_and_its_folder(save_goodfire):
    path = save_goodfire()
    weights, x = torch.load(path, weights_only=True), x_of()
    latents = torch.relu(x @ weights["encoder_linear.weight"].T + weights["encoder_linear.bias"])
    expected = latents @ weights["decoder_linear.weight"].T + weights["decoder_linear.bias"]
    for source, more in ((path, {}), (path.parent, {}), (path.parent, {"subfolder": path.name})):
        sae = MatryoshkaSAE.from_pretrained(source, **more)
        assert_computes(sae, x, latents, expected)
        assert (sae.config.base_model, sae.config.site) == ("meta-llama/Llama-3.1-8B-Instruct", "layers.19:output")
    save_goodfire("Llama-3.3-70B-Instruct-SAE-l50.pt")
    with pytest.raises(FormatError, match=r"holds 2 SAEs; choose one with subfolder=: .*l19\.pth, .*l50\.pt"):
        MatryoshkaSAE.from_pretrained(path.parent)


def test_cross_layer_transcoders_have_no_equal(tmp_path, imported):
    weights = {name.lower(): tensor for name, tensor in tensors(D, threshold=True).items()}
    folder = tmp_path / "somewhere/clt/layer_1"
    folder.mkdir(parents=True)
    save_file(weights | {"w_dec": draw(F, 3, D, seed=1)}, folder / "params.safetensors")
    with pytest.raises(FormatError, match="crosscoder or cross-layer transcoder, which reads or writes several"):
        imported(folder, "gemma_scope")
    assert Files(folder).names == ("params.safetensors",)
