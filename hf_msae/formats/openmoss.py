"""OpenMOSS's Language-Model-SAEs (`lm_saes`, now `llamascopium`), two layouts.

The present one is `config.json` and `sae_weights.safetensors` with W_E (d, F), W_D (F, d); R1-Distill's files are of
the same kind with the older tensor names. Llama Scope's is `hyperparams.json` and `checkpoints/final.safetensors` with
`nn.Linear` weights and one threshold.

These SAEs see activations scaled to an average norm of sqrt(d), x·s with s = sqrt(d) / average norm. Like the
library's own inference form, what is read here takes activations as they are: pre-activations are divided by s, so
b_enc, b_dec and thresholds are, and the matrices stay.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_msae.formats.common import (
    ConvertedCheckpoint,
    Files,
    FormatError,
    Outline,
    check_tensors,
    complete_state,
    outlined,
    peek_json,
    read_json,
    read_safetensors,
    refuse_disagreement,
    single_level,
    target_k,
)
from hf_msae.formats.saelens_names import site_of_hook

LIBRARY = "Language-Model-SAEs"
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
OLD_CONFIG, OLD_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
FILES = (WEIGHTS, OLD_WEIGHTS)
AVERAGE_NORM = "dataset_average_activation_norm"

ACTIVATIONS = {"relu": "relu", "jumprelu": "jumprelu", "topk": "topk", "batchtopk": "batch_topk"}
_NAMES = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
_OLD_NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "decoder.weight",
    "b_dec": "decoder.bias",
}
_LOG_THRESHOLDS = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")


def recognises(files: Files) -> bool:
    """Whether the folder holds weights under this library's names, and a configuration with its keys."""
    if OLD_CONFIG in files.names and OLD_WEIGHTS in files.names:
        return True
    weights = (name for name in files.names if name.startswith("sae_weights."))
    return any(weights) and {"d_model", "act_fn"} <= peek_json(files, CONFIG).keys()


def read(files: Files, prefix_sizes: Sequence[int] | None = None) -> ConvertedCheckpoint:
    """Read an SAE of either layout.

    Raises `FormatError` for transcoders, Lorsa, CLT, GLU encoders, for scaling that depends on the token or batch, for
    weights that are not in safetensors, and where configuration and tensors disagree.
    """
    old = OLD_CONFIG in files.names
    config = read_json(files, OLD_CONFIG if old else CONFIG)
    weights_name = OLD_WEIGHTS if old else WEIGHTS
    _refuse_kinds(files, config, weights_name)
    weights = read_safetensors(files, weights_name)
    if "W_E_glu" in weights or "encoder_glu.weight" in weights:
        raise FormatError(f"{files} has a gated (GLU) encoder, which has no equal in MatryoshkaSAE.")
    notes: list[str] = []
    tensors = _oriented(files, config, weights, weights_name)
    num_latents, hidden_size = _checked_sizes(files, config, tensors, weights_name)
    scale = _activation_scale(files, config, weights, hidden_size, notes)
    activation = ACTIVATIONS[config["act_fn"].lower()]
    if activation == "jumprelu":
        tensors["threshold"] = _threshold(files, config, weights, num_latents, scale)
    for name in ("b_enc", "b_dec"):
        tensors[name] = tensors[name] / scale
    state = complete_state(files, tensors)
    if config.get("sparsity_include_decoder_norm"):
        _fold_decoder_norm(state, activation, notes)
    reported = config.get("top_k")
    ranked = activation in ("topk", "batch_topk")
    if ranked and not isinstance(reported, int):
        raise FormatError(f"The configuration of {files} should say top_k for act_fn={config['act_fn']!r}.")
    base_model = _base_model(files, notes)
    arguments = {
        "hidden_size": hidden_size,
        "num_latents": num_latents,
        "prefix_sizes": single_level(prefix_sizes, num_latents, files, notes),
        "k": reported if ranked else target_k(reported, num_latents, notes),
        "activation": activation,
        "inference": "topk" if activation == "topk" else "threshold",
        "apply_b_dec_to_input": False,
        "base_model": base_model,
        "site": _site(config["hook_point_in"], base_model, notes),
    }
    # Of batch TopK this library stores no threshold: it takes the largest of whatever batch it is given.
    return ConvertedCheckpoint(LIBRARY, arguments, state, notes, activation == "batch_topk")


def outline(files: Files) -> Outline:
    """What the configuration says. Raises `FormatError` for what has no equal here."""
    old = OLD_CONFIG in files.names
    config = read_json(files, OLD_CONFIG if old else CONFIG)
    _refuse_kinds(files, config, OLD_WEIGHTS if old else WEIGHTS)
    base_model = _base_model(files, [])
    num_latents = config.get("d_sae") or round((config.get("expansion_factor") or 0) * config["d_model"]) or None
    return outlined(
        lambda: single_level(None, num_latents, files, []) if num_latents else None,
        base_model=base_model,
        site=_site(config["hook_point_in"], base_model, []),
        num_latents=num_latents,
    )


def _refuse_kinds(files: Files, config: Mapping[str, Any], weights_name: str) -> None:
    """Raises `FormatError` for what cannot be read, before weights are fetched."""
    if weights_name not in files.names:
        held = ", ".join(name for name in files.names if name.startswith("sae_weights."))
        raise FormatError(f"{files} holds {held or 'no weights'}; of this library's forms only {WEIGHTS} can be read.")
    kind, act_fn, norm = config.get("sae_type", "sae"), config.get("act_fn"), config.get("norm_activation")
    if kind != "sae":
        raise FormatError(f"{files} has sae_type={kind!r}; only 'sae' has an equal in MatryoshkaSAE.")
    if not isinstance(act_fn, str) or act_fn.lower() not in ACTIVATIONS:
        raise FormatError(f"{files} has act_fn={act_fn!r}; only {', '.join(ACTIVATIONS)} have an equal here.")
    if config.get("use_glu") or config.get("use_glu_encoder"):
        raise FormatError(f"{files} has a gated (GLU) encoder, which has no equal in MatryoshkaSAE.")
    if norm not in ("dataset-wise", "inference"):
        raise FormatError(
            f"{files} has norm_activation={norm!r}. Only 'dataset-wise' scaling, one number, can be folded into the "
            "weights (and 'inference' says that it was); what depends on the token or the batch cannot."
        )
    hook_in, hook_out = config.get("hook_point_in"), config.get("hook_point_out", config.get("hook_point_in"))
    if not isinstance(hook_in, str):
        raise FormatError(f"The configuration of {files} should say hook_point_in; it has {hook_in!r}.")
    if hook_out != hook_in:
        raise FormatError(
            f"{files} reads {hook_in} and writes {hook_out}: a transcoder, which has no equal in MatryoshkaSAE."
        )
    if config.get("apply_decoder_bias_to_pre_encoder"):
        raise FormatError(
            f"{files} subtracts the decoder bias before encoding (apply_decoder_bias_to_pre_encoder), in units that "
            "differ between versions of the library; it cannot be read without guessing."
        )


def _oriented(
    files: Files, config: Mapping[str, Any], weights: Mapping[str, Tensor], weights_name: str
) -> dict[str, Tensor]:
    """W_enc and W_dec (num_latents, hidden_size) and the biases; a decoder without bias gets zeros."""
    names = _NAMES if "W_E" in weights else _OLD_NAMES
    with_bias = config.get("use_decoder_bias", names["b_dec"] in weights)
    check_tensors(files, weights_name, weights, [names[name] for name in _NAMES if name != "b_dec" or with_bias])
    tensors = {name: weights[names[name]].float() for name in ("W_enc", "b_enc", "W_dec")}
    for name in ("W_enc", "W_dec"):
        if tensors[name].ndim != 2:
            raise FormatError(
                f"{names[name]} of {files} has shape {tuple(tensors[name].shape)}; expected a matrix. It may be a "
                "crosscoder or CLT, which have no equal in MatryoshkaSAE."
            )
    transposed = "W_enc" if names is _NAMES else "W_dec"
    tensors[transposed] = tensors[transposed].mT
    hidden_size = tensors["W_dec"].shape[1]
    tensors["b_dec"] = weights[names["b_dec"]].float() if with_bias else torch.zeros(hidden_size)
    return tensors


def _checked_sizes(
    files: Files, config: Mapping[str, Any], tensors: Mapping[str, Tensor], weights_name: str
) -> tuple[int, int]:
    num_latents, hidden_size = tensors["W_enc"].shape
    refuse_disagreement(files, "d_model", config.get("d_model"), weights_name, hidden_size)
    refuse_disagreement(files, "d_sae", config.get("d_sae"), weights_name, num_latents)
    if config.get("expansion_factor") is not None:
        expanded = round(config["expansion_factor"] * hidden_size)
        refuse_disagreement(files, "expansion_factor x d_model", expanded, weights_name, num_latents)
    return num_latents, hidden_size


def _activation_scale(
    files: Files, config: Mapping[str, Any], weights: Mapping[str, Tensor], hidden_size: int, notes: list[str]
) -> float:
    """s, by which the SAE's input is multiplied; 1 where that was folded into the weights already."""
    if config["norm_activation"] == "inference":
        return 1.0
    hook, recorded = config["hook_point_in"], config.get(AVERAGE_NORM) or {}
    tensor = weights.get(f"{AVERAGE_NORM}.{hook}")
    average = float(tensor) if tensor is not None else recorded.get(hook, recorded.get("in"))
    if not isinstance(average, (int, float)) or not 0 < average < math.inf:
        raise FormatError(
            f"{files} has norm_activation='dataset-wise', but neither its weights nor its configuration hold "
            f"{AVERAGE_NORM} of {hook}, by which activations must be scaled."
        )
    notes.append(
        f"It was trained on activations of average norm {average:.6g} scaled to sqrt(d), which was folded in."
    )
    return math.sqrt(hidden_size) / average


def _threshold(
    files: Files, config: Mapping[str, Any], weights: Mapping[str, Tensor], num_latents: int, scale: float
) -> Tensor:
    """Thresholds (num_latents,) in units of raw activations, as Llama Scope's single one already is."""
    log_threshold = next((weights[name] for name in _LOG_THRESHOLDS if name in weights), None)
    if log_threshold is not None:
        return log_threshold.float().exp().expand(num_latents) / scale
    recorded = config.get("jump_relu_threshold")
    if not isinstance(recorded, (int, float)):
        raise FormatError(
            f"{files} is a JumpReLU SAE, but neither its weights ({', '.join(_LOG_THRESHOLDS)}) nor its configuration "
            "(jump_relu_threshold) hold thresholds."
        )
    return torch.full((num_latents,), float(recorded))


def _fold_decoder_norm(tensors: dict[str, Tensor], activation: str, notes: list[str]) -> None:
    """These SAEs select by pre-activation times norm of the latent's decoder row.

    Thresholds are divided by the norms, so that latents keep their values. Ranks need comparable latents: there the
    norm moves from the decoder into the encoder, and only the units of latents change.
    """
    norms = tensors["W_dec"].norm(dim=1)
    if activation == "jumprelu":
        # A latent that writes nothing is active nowhere: nothing times its norm exceeds a threshold.
        alive = norms > 0
        tensors["threshold"] = torch.where(alive, tensors["threshold"] / norms.where(alive, 1.0), 0.0)
        tensors["W_enc"] = tensors["W_enc"] * alive[:, None]
        tensors["b_enc"] = tensors["b_enc"] * alive
    elif activation in ("topk", "batch_topk"):
        tensors["W_enc"] = tensors["W_enc"] * norms[:, None]
        tensors["b_enc"] = tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / torch.where(norms > 0, norms, torch.ones_like(norms))[:, None]
        notes.append("Latents are in units of the norm of their decoder row, by which this library ranks them.")


def _base_model(files: Files, notes: list[str]) -> str | None:
    """Named nowhere in the files; Llama Scope's repos and folders have it in their names."""
    place = (Path(files.source) / files.subfolder).resolve().as_posix() if files.is_local else str(files)
    if re.search(r"Llama3_1-8B-Base", place):
        return "meta-llama/Llama-3.1-8B"
    notes.append("The language model is not recorded; set config.base_model.")
    return None


def _site(hook: str, base_model: str | None, notes: list[str]) -> str | None:
    """Our name of the place, which the library calls as TransformerLens does."""
    site = site_of_hook(hook, base_model)
    if site is None:
        notes.append(f"The place {hook!r} has no equal that is known here; set config.site.")
    return site
