"""Every class that can be read, in every normalisation, precision and form of file, beside what its library computes.

The formulas are those of each library's own encode and decode, in float64 and in the library's own units, on the very
numbers that the file holds. The imported SAE is widened to float64, too, so that what is compared is what was read and
folded, and nothing else.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_msae import MatryoshkaSAE
from hf_msae.formats.common import FormatError
from hf_msae.formats.conversion import load_library_checkpoint

pytestmark = pytest.mark.slow  # some hundreds of files are written

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
D, F, K, AVERAGE = 12, 40, 6, 9.0
HOOK = "blocks.1.hook_resid_post"


def draw(dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in float64 that are exact in `dtype`: W_enc (d, F), W_dec (F, d); x (60, d)."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,), "x": (60, D)}
    w = {name: torch.randn(*shape, generator=generator) * 0.5 for name, shape in shapes.items()}
    w["threshold"] = w["threshold"].abs() + 0.1
    return {name: tensor.to(dtype).double() for name, tensor in w.items()}


def stored(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def top(acts: Tensor, k: int = K) -> Tensor:
    values, places = acts.relu().topk(k, dim=-1)
    return torch.zeros_like(acts).scatter(-1, places, values)


def wrapped(tensors: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    prefix = {"plain": "", "parallel": "module.", "compiled": "_orig_mod.", "both": "module._orig_mod."}[form]
    return {prefix + name: tensor for name, tensor in tensors.items()}


def check(sae: MatryoshkaSAE, x: Tensor, latents: Tensor, reconstruction: Tensor) -> None:
    sae = sae.double().eval()
    with torch.no_grad():
        ours = sae.encode(x)
        assert 0 < (ours != 0).double().mean() < 1
        torch.testing.assert_close(ours, latents, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sae.decode(ours), reconstruction, rtol=1e-5, atol=1e-6)


# dictionary_learning

PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
LAYOUTS = {
    "MatryoshkaBatchTopKSAE": PLAIN,
    "JumpReluAutoEncoder": PLAIN,
    "BatchTopKSAE": LINEAR | {"b_dec": "b_dec"},
    "AutoEncoderTopK": LINEAR | {"b_dec": "b_dec"},
    "AutoEncoder": LINEAR | {"b_dec": "bias"},
    "AutoEncoderNew": LINEAR | {"b_dec": "decoder.bias"},
}


def dictionary_learning_tensors(w: dict[str, Tensor], name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    layout = LAYOUTS[name]
    turned = {"W_enc", "W_dec"} if layout is not PLAIN else set()
    tensors = {theirs: w[ours].T if ours in turned else w[ours] for ours, theirs in layout.items()}
    tensors = stored(tensors, dtype)
    if name in ("MatryoshkaBatchTopKSAE", "BatchTopKSAE"):
        tensors |= {"threshold": torch.tensor(0.25), "k": torch.tensor(K, dtype=torch.int32)}
    if name == "MatryoshkaBatchTopKSAE":
        tensors["group_sizes"] = torch.tensor([5, 15, 20])
    if name == "JumpReluAutoEncoder":
        tensors["threshold"] = w["threshold"].to(dtype)
    if name == "AutoEncoderTopK":
        tensors["k"] = torch.tensor(K)
    return tensors


def dictionary_learning_formula(w: dict[str, Tensor], name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    subtracts = name not in ("JumpReluAutoEncoder", "AutoEncoderNew")
    acts = ((x - w["b_dec"] if subtracts else x) @ w["W_enc"] + w["b_enc"]).relu()
    if name in ("MatryoshkaBatchTopKSAE", "BatchTopKSAE"):
        acts = acts * (acts > 0.25)
    if name == "JumpReluAutoEncoder":
        acts = acts * (acts > w["threshold"])
    if name == "AutoEncoderTopK":
        acts = top(acts)
    reconstruction = acts @ w["W_dec"] + w["b_dec"]
    # Its loader brings the decoder's columns to norm 1; the latents then are in those units.
    return acts * w["W_dec"].norm(dim=1) if name == "AutoEncoder" else acts, reconstruction


@pytest.mark.parametrize("form", ["plain", "parallel", "compiled", "both", "backup", "backup of a parallel one"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_dictionary_learning(tmp_path: Path, name: str, dtype: torch.dtype, form: str) -> None:
    w = draw(dtype)
    tensors, factor = dictionary_learning_tensors(w, name, dtype), 3.5
    x = w["x"]
    latents, reconstruction = dictionary_learning_formula(w, name, x)
    content: dict = wrapped(tensors, form) if not form.startswith("backup") else {}
    if form.startswith("backup"):
        inner = wrapped(tensors, "parallel" if "parallel" in form else "plain")
        content = {"step": 7, "ae": inner, "optimizer": {}, "config": {}, "norm_factor": factor}
        # It was trained on x / factor; of x everything is so many times larger.
        x, latents, reconstruction = x * factor, latents * factor, reconstruction * factor
    torch.save(content, tmp_path / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": F, "lm_name": "gpt2"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    check(load_library_checkpoint(MatryoshkaSAE, tmp_path, None), x, latents, reconstruction)


# The original Matryoshka code


@pytest.mark.parametrize("form", ["plain", "parallel", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["global-matryoshka-topk", "batch-topk", "topk", "vanilla", "topk with bias"])
def test_bussmann(tmp_path: Path, kind: str, dtype: torch.dtype, form: str) -> None:
    w = draw(dtype)
    biased = kind in ("vanilla", "topk with bias")
    tensors = stored({name: w[name] for name in PLAIN}, dtype)
    acts = ((w["x"] - w["b_dec"]) @ w["W_enc"] + (w["b_enc"] if biased else 0)).relu()
    if kind in ("global-matryoshka-topk", "batch-topk"):
        tensors["threshold"] = torch.tensor(0.25).to(dtype)
        acts = acts * (acts > 0.25)
    elif kind.startswith("topk"):
        acts = top(acts)
    torch.save(wrapped(tensors, form), tmp_path / "sae.pt")
    config = {
        "sae_type": kind.split()[0],
        "top_k": K,
        "input_unit_norm": False,
        "use_encoder_bias": kind == "topk with bias",
        # One configuration is copied for all SAEs of a run: the plain ones have it, too.
        "group_sizes": [5, 15, 20],
        "hook_point": HOOK,
    }
    (tmp_path / "config.json").write_text(json.dumps({key: str(value) for key, value in config.items()}))
    sae = load_library_checkpoint(MatryoshkaSAE, tmp_path, None)
    assert sae.config.prefix_sizes == ([5, 20, 40] if "matryoshka" in kind else [40])
    check(sae, w["x"], acts, acts @ w["W_dec"] + w["b_dec"])


# Language-Model-SAEs


@pytest.mark.parametrize("norm", ["dataset-wise", "inference"])
@pytest.mark.parametrize("by_norm", [True, False], ids=["by decoder norm", "by itself"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk", "batchtopk"])
def test_openmoss(tmp_path: Path, act_fn: str, dtype: torch.dtype, by_norm: bool, norm: str) -> None:
    w = draw(dtype)
    tensors = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    scale = math.sqrt(D) / AVERAGE if norm == "dataset-wise" else 1.0
    # In double precision, as thresholds that no precision rounds.
    more = {f"dataset_average_activation_norm.{HOOK}": torch.tensor(AVERAGE)}
    if act_fn == "jumprelu":
        more["activation_function.log_jumprelu_threshold"] = w["threshold"].log()
    save_file(stored(tensors, dtype) | more, tmp_path / "sae_weights.safetensors")
    config = {"sae_type": "sae", "d_model": D, "act_fn": act_fn, "norm_activation": norm, "top_k": K}
    config |= {"hook_point_in": HOOK, "sparsity_include_decoder_norm": by_norm}
    (tmp_path / "config.json").write_text(json.dumps(config))
    pre = w["x"] * scale @ w["W_enc"] + w["b_enc"]
    norms = w["W_dec"].norm(dim=1) if by_norm else torch.ones(F, dtype=torch.float64)
    acts = pre.relu()
    if act_fn == "jumprelu":
        acts = acts * (pre * norms > w["threshold"])
    elif act_fn == "topk":
        acts = top(acts * norms) / norms
    if act_fn == "batchtopk":
        with pytest.raises(FormatError, match="without a threshold"):
            load_library_checkpoint(MatryoshkaSAE, tmp_path, None)
        sae = load_library_checkpoint(MatryoshkaSAE, tmp_path, None, calibrating=True).double().eval()
        sae.calibrate_threshold([w["x"]])
        kept = top((acts * norms).flatten(), K * len(w["x"])).view_as(acts)
        with torch.no_grad():
            ours = sae.encode(w["x"])
        # The largest of the batch, but for ties at the threshold's bin.
        assert ((ours > 0) != (kept > 0)).sum() <= 0.01 * (kept > 0).sum()
        return
    units = norms if by_norm and act_fn == "topk" else 1
    check(
        load_library_checkpoint(MatryoshkaSAE, tmp_path, None),
        w["x"],
        acts * units / scale,
        (acts @ w["W_dec"] + w["b_dec"]) / scale,
    )


# SAELens


def saelens_scale(folder: Path, w: dict[str, Tensor], norm: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What the SAE sees of x, and the way back; the numbers are written beside the checkpoint."""
    if norm == "expected_average_only_in":
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.4}))
        return w["x"] * 0.4, lambda out: out / 0.4
    if norm == "covariance_whitening":
        generator = torch.Generator().manual_seed(2)
        matrix = torch.eye(D, dtype=torch.float64) + 0.2 * torch.randn(D, D, generator=generator, dtype=torch.float64)
        mean = torch.randn(D, generator=generator, dtype=torch.float64)
        tensors = {"mean": mean, "matrix": matrix, "inverse_matrix": torch.linalg.inv(matrix).contiguous()}
        save_file(tensors, folder / "activation_whitening.safetensors")
        return (w["x"] - mean) @ matrix, lambda out: out @ tensors["inverse_matrix"] + mean
    return w["x"], lambda out: out


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("norm", ["none", "expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk"])
def test_saelens(tmp_path: Path, kind: str, dtype: torch.dtype, norm: str, subtract: bool) -> None:
    w = draw(dtype)
    tensors = stored({name: w[name] for name in PLAIN}, dtype)
    z, back = saelens_scale(tmp_path, w, norm)
    acts = ((z - w["b_dec"] if subtract else z) @ w["W_enc"] + w["b_enc"]).relu()
    if kind == "topk":
        acts = top(acts)
    elif kind == "jumprelu":
        tensors["threshold"] = w["threshold"].to(dtype)
        acts = acts * (acts > w["threshold"])
    elif kind != "standard":
        tensors["topk_threshold"] = torch.tensor(0.25, dtype=torch.float64)
        acts = acts * (acts > 0.25)
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    config = {"architecture": kind, "d_in": D, "d_sae": F, "k": K, "dtype": str(dtype).removeprefix("torch.")}
    config |= {"apply_b_dec_to_input": subtract, "normalize_activations": norm}
    if kind == "matryoshka_batchtopk":
        config["matryoshka_widths"] = [5, 20, 40]
    config["metadata"] = {"sae_lens_version": "6.54.0", "hook_name": HOOK}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    sae = load_library_checkpoint(MatryoshkaSAE, tmp_path, None)
    check(sae, w["x"], acts, back(acts @ w["W_dec"] + w["b_dec"]))


# sparsify and Gemma Scope


@pytest.mark.parametrize("form", ["plain", "parallel", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparsify(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    w = draw(dtype)
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    folder = tmp_path / "layers.1"
    folder.mkdir()
    save_file(wrapped(stored(tensors, dtype), form), folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": K, "num_latents": F, "d_in": D}))
    acts = top((w["x"] - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    check(load_library_checkpoint(MatryoshkaSAE, folder, None), w["x"], acts, acts @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("release", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ["layer_1", "embedding"])
def test_gemma_scope(tmp_path: Path, place: str, dtype: torch.dtype, release: int) -> None:
    w = draw(dtype)
    tensors = stored({name: w[name] for name in (*PLAIN, "threshold")}, dtype)
    folder = tmp_path / "gemma-scope-2b-pt-res" / place / "width_16k" / "average_l0_17"
    folder.mkdir(parents=True)
    if release == 1:
        if dtype == torch.bfloat16:
            pytest.skip("numpy has no bfloat16")
        np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif place == "embedding":
        pytest.skip("the second release has no embedding SAEs")
    else:
        save_file({name.lower(): tensor for name, tensor in tensors.items()}, folder / "params.safetensors")
    acts = (w["x"] @ w["W_enc"] + w["b_enc"]).relu()
    acts = acts * (acts > w["threshold"])
    scale = math.sqrt(D) if place == "embedding" else 1.0
    check(
        load_library_checkpoint(MatryoshkaSAE, folder, None),
        w["x"] * scale,
        acts,
        (acts @ w["W_dec"] + w["b_dec"]) * scale,
    )


# Numbers that are none


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_numbers_that_are_none_are_refused_by_name_and_place(tmp_path: Path, name: str, value: float) -> None:
    tensors = stored({key: draw(torch.float32)[key] for key in (*PLAIN, "threshold")}, torch.float32)
    tensors[name].view(-1)[7] = value
    torch.save(tensors, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "JumpReluAutoEncoder"}}))
    with pytest.raises(FormatError, match=rf"{name} of .* holds {value} at \[.*\] \(1 of [\d,]+ numbers"):
        load_library_checkpoint(MatryoshkaSAE, tmp_path, None)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_integers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    tensors = stored({key: draw(torch.float32)[key] for key in (*PLAIN, "threshold")}, torch.float32)
    torch.save(tensors | {name: tensors[name].long()}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "JumpReluAutoEncoder"}}))
    with pytest.raises(FormatError, match=f"{name} of .* is torch.int64; weights should be floating-point"):
        load_library_checkpoint(MatryoshkaSAE, tmp_path, None)
