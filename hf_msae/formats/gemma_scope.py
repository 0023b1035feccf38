"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`): JumpReLU SAEs and transcoders of Gemma 2 and Gemma 3.

Transcoders of both are read: they map the MLP's normalised input to its normalised output, some with an affine skip.

The files of Gemma Scope 1 say nothing but the weights: model, layer and L0 are in the names of the repo and its
folders (`gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82`). Those of Gemma Scope 2 have a `config.json`, which
may be missing. Neither records nesting, whatever was trained, so one level is read unless prefix sizes are given.
"""

import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_msae.formats.common import (
    ConvertedCheckpoint,
    Files,
    FormatError,
    Outline,
    check_tensors,
    complete_state,
    holds,
    read_json,
    read_safetensors,
    refuse_disagreement,
    refuse_many,
    target_k,
)

LIBRARY = "Gemma Scope"
WEIGHTS_1 = "params.npz"
WEIGHTS_2 = "params.safetensors"
CONFIG = "config.json"
FILES = (WEIGHTS_1, WEIGHTS_2)
# Both were trained on windows of this many tokens, each beginning with BOS.
CONTEXT_LENGTH = 1024

_REPO_1 = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)")
_REPO_2 = re.compile(r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)")
# What was read where, as the report describes it: the MLP's output after the norm behind it, and the attention heads
# before their last projection.
_SITES = {
    "res": "layers.{}:output",
    "mlp": "layers.{}.post_feedforward_layernorm:output",
    "att": "layers.{}.self_attn.o_proj:input",
    "resid_post": "layers.{}:output",
    "mlp_out": "layers.{}.post_feedforward_layernorm:output",
    "attn_out": "layers.{}.self_attn.o_proj:input",
    "transcoder": "layers.{}.pre_feedforward_layernorm:output",
    "transcoders": "layers.{}.pre_feedforward_layernorm:output",
}
_TRANSCODER_OUT = "layers.{}.post_feedforward_layernorm:output"
SKIP = "affine_skip_connection"
# transformers multiplies the embedding by √d before the first layer reads it.
EMBEDDING_SITE = "layers.0:input"
_OTHER_KINDS = re.compile(r"(crosscoder|clt)(_all)?")


class _Origin(NamedTuple):
    """Where an SAE's activations came from, as far as it is known."""

    base_model: str | None
    site: str | None
    site_out: str | None = None
    is_transcoder: bool = False


def recognises(files: Files) -> bool:
    """Whether this folder, or one below it, holds `params.npz`, or a `params.safetensors`."""
    return holds(files, WEIGHTS_1) or holds(files, WEIGHTS_2)


def read(files: Files, prefix_sizes: Sequence[int] | None = None) -> ConvertedCheckpoint:
    """Read one SAE's folder of either release.

    Raises `FormatError` for crosscoders and cross-layer transcoders, and for a folder that holds many SAEs.
    """
    first = holds(files, WEIGHTS_1)
    refuse_many(files, WEIGHTS_1 if first else WEIGHTS_2, LIBRARY)
    place = _place(files)
    _refuse_kinds(files, place)
    weights = _read_npz(files) if first else read_safetensors(files, WEIGHTS_2)
    config = read_json(files, CONFIG) if not first and CONFIG in files.names else {}
    notes: list[str] = []
    origin = _origin_1(place, notes) if first else _origin_2(files, config, place, notes)
    state = _state(files, weights, WEIGHTS_1 if first else WEIGHTS_2, origin.is_transcoder)
    if config.get("affine_connection") is not None:
        refuse_disagreement(files, "affine_connection", config["affine_connection"], WEIGHTS_2, "W_skip" in state)
    num_latents, hidden_size = state["W_enc"].shape
    if first and origin.site == EMBEDDING_SITE:
        state = _of_scaled_embedding(state, notes)
    arguments = {
        "hidden_size": hidden_size,
        "num_latents": num_latents,
        "prefix_sizes": _prefix_sizes(prefix_sizes, num_latents, notes),
        "k": target_k(_l0(place, config), num_latents, notes),
        "activation": "jumprelu",
        "apply_b_dec_to_input": False,
        "hidden_size_out": state["W_dec"].shape[1] if origin.is_transcoder else None,
        "skip": "W_skip" in state,
        "base_model": origin.base_model,
        "site": origin.site,
        "site_out": origin.site_out,
        "prepend_bos": True,
        "context_length": CONTEXT_LENGTH,
    }
    return ConvertedCheckpoint(LIBRARY, arguments, state, notes)


def outline(files: Files) -> Outline:
    """What the names of repo and folders say: the second release has a configuration a folder, and many hundreds."""
    place = _place(files)
    _refuse_kinds(files, place)
    origin = _origin_1(place, []) if WEIGHTS_1 in files.names else _origin_2(files, {}, place, [])
    width = re.search(r"width_(\d+)(k|m)(?:[_/]|$)", place)
    if width is None:
        return Outline(origin.base_model, origin.site, origin.site_out)
    # "65k" is 65,536.
    num_latents = 2 ** round(math.log2(int(width[1]) * {"k": 1e3, "m": 1e6}[width[2]]))
    return Outline(origin.base_model, origin.site, origin.site_out, num_latents, [num_latents])


def _place(files: Files) -> str:
    """Repo and folders, whose names say what the files do not."""
    if files.is_local:
        return (Path(files.source) / files.subfolder).resolve().as_posix()
    return str(files)


def _refuse_kinds(files: Files, place: str) -> None:
    if any(_OTHER_KINDS.fullmatch(name) for name in place.split("/")[-2:-1]):
        raise FormatError(
            f"{files} is a crosscoder or cross-layer transcoder, which reads or writes several layers; only SAEs "
            "(resid_post, mlp_out, attn_out) and transcoders of one layer have an equal in MatryoshkaSAE."
        )


def _read_npz(files: Files) -> dict[str, Tensor]:
    """The arrays of `params.npz`; pickled ones are refused unread."""
    path = files.path(WEIGHTS_1)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise FormatError(
            f"{WEIGHTS_1} of {files} ({path.stat().st_size:,} bytes) is no whole archive of plain numpy arrays "
            f"({error}); pickled objects are never read. Fetch it again from where it was published."
        ) from None


def _state(files: Files, weights: Mapping[str, Tensor], name: str, is_transcoder: bool) -> dict[str, Tensor]:
    """Weights in our orientation. The first release writes W_enc, the second w_enc."""
    lower = {key.lower(): tensor for key, tensor in weights.items()}
    check_tensors(files, name, lower, ["w_enc", "w_dec", "b_enc", "b_dec", "threshold"])
    if lower["w_dec"].ndim != 2 or (SKIP in lower and not is_transcoder):
        raise FormatError(
            f"{files} has w_dec of shape {tuple(lower['w_dec'].shape)}"
            f"{f' and an {SKIP}' if SKIP in lower else ''}, which no SAE of one layer has: it is a crosscoder, or a "
            "transcoder whose folder does not say so (transcoder_all/layer_12_...), as Gemma Scope's do."
        )
    ours = {
        "W_enc": lower["w_enc"].mT if lower["w_enc"].ndim == 2 else lower["w_enc"],
        "W_dec": lower["w_dec"],
        "b_enc": lower["b_enc"],
        "b_dec": lower["b_dec"],
        "threshold": lower["threshold"],
    }
    if SKIP in lower:
        ours["W_skip"] = lower[SKIP].mT if lower[SKIP].ndim == 2 else lower[SKIP]
    return complete_state(files, ours, lower["w_dec"].shape[1] if is_transcoder else None)


def _of_scaled_embedding(state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Divide the encoder by √d, and multiply what is written; latents stay as they are.

    The embedding SAEs read rows of the embedding, and at the first layer's input stand √d times those.
    """
    scale = math.sqrt(state["b_dec"].shape[0])
    factors = {"W_enc": 1 / scale, "W_dec": scale, "b_dec": scale}
    exact = {name: tensor.double() * factors.get(name, 1.0) for name, tensor in state.items()}
    notes.append(
        "It was trained on rows of the embedding; the language model multiplies them by sqrt(d), which was folded in, "
        f"so that it reads {EMBEDDING_SITE}."
    )
    return {name: exact[name].to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in state.items()}


def _prefix_sizes(given: Sequence[int] | None, num_latents: int, notes: list[str]) -> list[int]:
    if given is not None:
        return sorted({*map(int, given), num_latents})
    notes.append(
        "Gemma Scope's files do not record at which sizes an SAE is nested, if it is, so it was read as one level. "
        "Give prefix_sizes where you know them."
    )
    return [num_latents]


def _l0(place: str, config: Mapping[str, Any]) -> Any:
    match = re.search(r"average_l0_(\d+)", place)
    return int(match[1]) if match is not None else config.get("l0")


def _origin_1(place: str, notes: list[str]) -> _Origin:
    repo = _REPO_1.search(place)
    if repo is None:
        notes.append(
            f"No folder of {place} is named as Gemma Scope's repos are (gemma-scope-2b-pt-res), so neither language "
            "model nor site is known; set config.base_model and config.site."
        )
        return _Origin(None, None)
    base_model = f"google/gemma-2-{repo[1]}" + ("-it" if repo[2] == "it" else "")
    # Folders above the repo's may have any name.
    inside = place[repo.end() :]
    layer = re.search(r"layer_(\d+)(?:/|$)", inside)
    if layer is None and re.search(r"/embedding(/|$)", inside):
        return _Origin(base_model, EMBEDDING_SITE)
    if layer is None:
        notes.append("No folder says which layer this is; set config.site.")
        return _Origin(base_model, None, None, repo[3] == "transcoders")
    site = _SITES[repo[3]].format(layer[1])
    if repo[3] == "transcoders":
        return _Origin(base_model, site, _TRANSCODER_OUT.format(layer[1]), True)
    return _Origin(base_model, site)


def _origin_2(files: Files, config: Mapping[str, Any], place: str, notes: list[str]) -> _Origin:
    """From `config.json`, and where that is missing from the names of repo and folder."""
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise FormatError(
            f"{files} has architecture={config['architecture']!r}; Gemma Scope 2's SAEs are 'jump_relu'."
        )
    hook, hook_out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    in_folder = re.search(r"transcoder(?:_all)?/layer_(\d+)", place)
    is_transcoder = (hook_out is not None and hook_out != hook) or in_folder is not None
    site = _hook_site(hook) if isinstance(hook, str) else _folder_site(place)
    site_out = None
    if is_transcoder:
        site_out = _hook_site(hook_out) if isinstance(hook_out, str) else None
        if site_out is None and in_folder is not None:
            site_out = _TRANSCODER_OUT.format(in_folder[1])
    base_model = _model_2(config.get("model_name"), place)
    places = [("base_model", base_model), ("site", site), *([("site_out", site_out)] if is_transcoder else [])]
    unknown = [name for name, value in places if value is None]
    if unknown:
        notes.append(f"Neither {CONFIG} nor the folders' names say {' and '.join(unknown)}; set them in the config.")
    return _Origin(base_model, site, site_out, is_transcoder)


def _hook_site(hook: str) -> str | None:
    """Translate `model.layers.12.self_attn.o_proj.input`.

    Our words also hold where the layers lie deeper, as in the multimodal Gemma 3 models.
    """
    match = re.fullmatch(r"(?:model\.)?(?:language_model\.)?(layers\.\d+(?:\.\w+)*)\.(input|output)", hook)
    return f"{match[1]}:{match[2]}" if match is not None else None


def _folder_site(place: str) -> str | None:
    match = re.search(r"(resid_post|mlp_out|attn_out|transcoder)(?:_all)?/layer_(\d+)", place)
    return _SITES[match[1]].format(match[2]) if match is not None else None


def _model_2(recorded: Any, place: str) -> str | None:
    """The Hub id. Recorded names lack the owner and may spell Gemma 3 as `gemma-v3`; the smallest has no suffix pt."""
    if isinstance(recorded, str):
        name = recorded.removeprefix("google/").replace("-v3", "-3")
    else:
        repo = _REPO_2.search(place)
        if repo is None:
            return None
        name = f"gemma-3-{repo[1]}-{repo[2]}"
    return "google/" + ("gemma-3-270m" if name == "gemma-3-270m-pt" else name)
