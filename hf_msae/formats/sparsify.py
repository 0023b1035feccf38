"""sparsify's `SparseCoder` folders, `cfg.json` and `sae.safetensors`, read and written.

Its encoder keeps the k largest of each token and has no threshold, so such an SAE goes by rank at inference here, too.
A run's root holds one folder for each hookpoint, which the folder is named after. sparsify ignores keys of `cfg.json`
that it does not know; what we write names there the prefix sizes, and all else that it cannot hold (see `round_trip`).
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_msae.atomic_files import atomic_folder
from hf_msae.errors import InputError
from hf_msae.formats.common import (
    ConvertedCheckpoint,
    Files,
    FormatError,
    Outline,
    check_tensors,
    chosen_prefix_sizes,
    complete_state,
    holds,
    outlined,
    read_json,
    read_safetensors,
    refuse_disagreement,
    refuse_many,
    single_level,
)
from hf_msae.formats.round_trip import KEY, describe, recorded_places, restore
from hf_msae.modeling import MatryoshkaSAE

logger = logging.getLogger(__name__)

LIBRARY = "sparsify"
CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
FILES = (WEIGHTS,)
# Of a transcoder with a skip connection.
SKIP = "W_skip"
TENSORS = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}

# A module path that passes through a numbered layer, such as layers.10 or h.3.mlp.
_HOOKPOINT = re.compile(r"[A-Za-z_]\w*(\.\w+)*\.\d+(\.\w+)*")
_SEED = re.compile(r"seed\d+")


def recognises(files: Files) -> bool:
    """Whether this folder, or one below it, holds `cfg.json` and `sae.safetensors`."""
    return holds(files, WEIGHTS) and holds(files, CONFIG)


def read(files: Files, prefix_sizes: Sequence[int] | None = None) -> ConvertedCheckpoint:
    """Read the folder of one hookpoint.

    A transcoder (`transcode`) reads its hookpoint's input and writes its output. Raises `FormatError` for SAEs with a
    skip connection, GroupMax and signed SAEs, for a folder with many hookpoints, and where configuration and tensors
    disagree.
    """
    refuse_many(files, WEIGHTS, LIBRARY)
    if CONFIG not in files.names:
        raise FormatError(f"{files} holds {WEIGHTS}, but no {CONFIG} beside it, which says k.")
    cfg = read_json(files, CONFIG)
    _refuse_kinds(files, cfg)
    weights = read_safetensors(files, WEIGHTS)
    transcode, skip = bool(cfg.get("transcode")), bool(cfg.get("skip_connection"))
    check_tensors(files, WEIGHTS, weights, [*TENSORS.values(), *([SKIP] if skip else [])])
    tensors = {ours: weights[theirs] for ours, theirs in TENSORS.items()} | ({SKIP: weights[SKIP]} if skip else {})
    written = weights[TENSORS["b_dec"]].numel() if transcode else None
    state = complete_state(files, tensors, written)
    num_latents, hidden_size = state["W_enc"].shape
    _check_sizes(files, cfg, num_latents, hidden_size)
    notes: list[str] = []
    recorded = cfg.get("prefix_sizes")
    if recorded is None:
        sizes = single_level(prefix_sizes, num_latents, files, notes)
    else:
        sizes = chosen_prefix_sizes(recorded, prefix_sizes, num_latents, files, notes)
    run, facts = _run_config(files), cfg.get(KEY)
    arguments = {
        "hidden_size": hidden_size,
        "num_latents": num_latents,
        "prefix_sizes": sizes,
        "k": cfg["k"],
        "activation": "topk",
        "inference": "topk",
        "apply_b_dec_to_input": not transcode,
        "hidden_size_out": written,
        "skip": skip,
        "base_model": run.get("model"),
        "context_length": run.get("ctx_len"),
        "site": _site(files, notes if facts is None else []),
    }
    if transcode and arguments["site"] is not None:
        arguments["site_out"], path = arguments["site"], arguments["site"].removesuffix(":output")
        arguments["site"] = f"{path}:input"
    arguments, state = restore(files, facts, arguments, state, notes)
    return ConvertedCheckpoint(LIBRARY, arguments, state, notes)


def outline(files: Files) -> Outline:
    """What `cfg.json`, the folder's name and the run's root say. Raises `FormatError` for what has no equal here."""
    cfg = read_json(files, CONFIG)
    _refuse_kinds(files, cfg)
    num_latents = cfg.get("num_latents") or (cfg.get("expansion_factor") or 0) * (cfg.get("d_in") or 0) or None
    site, path = _site(files, []), (_site(files, []) or "").removesuffix(":output")
    transcodes = bool(cfg.get("transcode")) and site is not None
    recorded = cfg.get("prefix_sizes")
    places = {
        "base_model": _run_config(files).get("model"),
        "site": f"{path}:input" if transcodes else site,
        "site_out": site if transcodes else None,
    }
    return outlined(
        lambda: recorded or (single_level(None, num_latents, files, []) if num_latents else None),
        num_latents=num_latents,
        **places | recorded_places(cfg.get(KEY)),
    )


def _refuse_kinds(files: Files, cfg: dict[str, Any]) -> None:
    """Raises `FormatError` for what computes something that a MatryoshkaSAE does not."""
    if cfg.get("activation", "topk") != "topk":
        raise FormatError(
            f"{files} has activation={cfg['activation']!r}; only 'topk' has an equal in MatryoshkaSAE "
            "(GroupMax takes the largest of each group of latents)."
        )
    reasons = {
        "skip_connection": "adds a linear map of its input to the reconstruction of that input",
        "signed": "ranks latents by magnitude and keeps negative ones",
    }
    for key, reason in reasons.items():
        if cfg.get(key) and not (key == "skip_connection" and cfg.get("transcode")):
            raise FormatError(f"{files} has {key}=true: it {reason}, which has no equal in MatryoshkaSAE.")
    if not isinstance(cfg.get("k"), int) or cfg["k"] < 1:
        raise FormatError(
            f"{CONFIG} of {files} should say k, the latents active per token; it has k={cfg.get('k')!r}."
        )


def _check_sizes(files: Files, cfg: dict[str, Any], num_latents: int, hidden_size: int) -> None:
    refuse_disagreement(files, "d_in", cfg.get("d_in"), WEIGHTS, hidden_size)
    if cfg.get("num_latents"):
        refuse_disagreement(files, "num_latents", cfg["num_latents"], WEIGHTS, num_latents)
    elif cfg.get("expansion_factor"):
        expanded = cfg["expansion_factor"] * hidden_size
        refuse_disagreement(files, "expansion_factor x d_in", expanded, WEIGHTS, num_latents)


def _folder(files: Files) -> PurePosixPath:
    """The checkpoint's folder, absolute where it is on this machine, as the path in its repo elsewhere."""
    if files.is_local:
        return PurePosixPath((Path(files.source) / files.subfolder).resolve().as_posix())
    return PurePosixPath(files.subfolder)


def _site(files: Files, notes: list[str]) -> str | None:
    """The hookpoint: sparsify names the folder after it, and a folder inside after the seed where there are many."""
    folder = _folder(files)
    name = folder.parent.name if _SEED.fullmatch(folder.name) else folder.name
    if _HOOKPOINT.fullmatch(name):
        return f"{name}:output"
    notes.append(
        f"The folder's name {name!r} is no hookpoint such as layers.10, so the site is unknown; set config.site."
    )
    return None


def _run_config(files: Files) -> dict[str, Any]:
    """What the run's root says, where it is within reach: the language model and the context length."""
    folder = _folder(files)
    up = 2 if _SEED.fullmatch(folder.name) else 1
    if files.is_local:
        root = folder.parents[up - 1] if len(folder.parents) >= up else folder
        run_files = replace(files, source=str(root), subfolder="")
        # The folder above may be anything, a home folder say: look for one file, do not list all.
        present = (Path(root) / "config.json").is_file()
    elif len(folder.parts) >= up:
        run_files = replace(files, subfolder="/".join(folder.parts[:-up]))
        present = "config.json" in run_files.names
    else:
        return {}
    run = read_json(run_files, "config.json") if present else {}
    return run if "sae" in run else {}


def write(sae: MatryoshkaSAE, folder: str | Path) -> None:
    """Write what `sparsify.SparseCoder.load_from_disk` reads, into a new folder, whole or not at all.

    sparsify can only rank, so only SAEs with `activation="topk"` can be written; one that goes by threshold at
    inference here goes by rank there, and a warning says so. Raises `ValueError` for others, `FileExistsError` where
    something is there.
    """
    config = sae.config
    if config.activation != "topk":
        raise InputError(
            "sparsify has only TopK SAEs, which keep the k largest of each token, and this one has "
            f"activation={config.activation!r}, which keeps what exceeds a threshold. Export it to SAELens "
            "(to_saelens), whose JumpReLU form says the same."
        )
    if config.hidden_size != config.output_size:
        raise InputError(
            f"sparsify's transcoders read and write one width, and this reads {config.hidden_size} and writes "
            f"{config.output_size}. Export it to SAELens (to_saelens)."
        )
    tensors = {theirs: _tensor(sae, ours) for ours, theirs in TENSORS.items()}
    tensors |= {SKIP: _tensor(sae, SKIP)} if config.skip else {}
    if not config.is_transcoder and not config.apply_b_dec_to_input:
        # sparsify always subtracts b_dec before encoding; its encoder bias then has to add it back.
        shift = tensors["encoder.weight"].double() @ tensors["b_dec"].double()
        tensors["encoder.bias"] = (tensors["encoder.bias"].double() + shift).to(tensors["encoder.bias"].dtype)
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, config.num_latents // config.hidden_size),
        "normalize_decoder": False,
        "num_latents": config.num_latents,
        "k": round(config.k),
        "multi_topk": False,
        "skip_connection": config.skip,
        "transcode": config.is_transcoder,
        "d_in": config.hidden_size,
        "prefix_sizes": list(config.prefix_sizes),
        # Ranking needs no threshold; what keeps latents here comes back with the rest.
        KEY: describe(sae, also=("inference", "threshold") if config.inference == "threshold" else ()),
    }
    if config.inference != "topk":
        logger.warning(
            "%s: this SAE keeps what exceeds its threshold; sparsify will keep the %d largest of each token instead, "
            "so latents near the threshold differ.",
            folder,
            round(config.k),
        )
    with atomic_folder(folder) as beside:
        save_file(tensors, beside / WEIGHTS)
        (beside / CONFIG).write_text(json.dumps(cfg, indent=2), encoding="utf-8")


def _tensor(sae: MatryoshkaSAE, name: str) -> Tensor:
    with torch.no_grad():
        return sae.get_parameter(name).detach().cpu().contiguous().clone()
