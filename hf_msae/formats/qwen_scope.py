"""Qwen-Scope: `layer<n>.sae.pt` for every layer of a Qwen model, TopK SAEs of its residual stream (arXiv:2605.11887).

The files hold `W_enc` (num_latents, hidden_size), `W_dec` the other way round, and the biases, of which b_dec is not
subtracted before encoding. k, the width and the language model stand in the repo's name alone
(`Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`), so a folder that is named otherwise is refused.
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from hf_msae.formats.common import (
    ConvertedCheckpoint,
    Files,
    FormatError,
    Outline,
    check_tensors,
    complete_state,
    outlined,
    refuse_disagreement,
    single_level,
)
from hf_msae.formats.naming import natural_order
from hf_msae.formats.safe_pickle import read_pt

LIBRARY = "Qwen-Scope"
FILES = ("layer*.sae.pt",)
TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")
_FILE = re.compile(r"layer(\d+)\.sae\.pt")
_REPO = re.compile(r"SAE-(?P<place>[A-Za-z]+)-(?P<model>Qwen[\w.-]+?)-W(?P<width>\d+)K-L0_(?P<k>\d+)")


def recognises(files: Files) -> bool:
    """Whether this folder holds a `layer<n>.sae.pt`."""
    return bool(_layers(files))


def _layers(files: Files) -> list[str]:
    return sorted((name for name in files.names if _FILE.fullmatch(name)), key=natural_order)


def read(files: Files, prefix_sizes: Sequence[int] | None = None) -> ConvertedCheckpoint:
    """Read one layer's SAE.

    Raises `FormatError` where several layers are there and none was chosen, which lists them; for a name that says
    neither k nor model; for another place than the residual stream; and where name and tensors disagree.
    """
    name = files.chosen or _only_layer(files)
    layer, repo = _FILE.fullmatch(PurePosixPath(name).name), _named(files)
    if layer is None:
        raise FormatError(f"{name} of {files} is not named as Qwen-Scope's files are (layer12.sae.pt).")
    weights = read_pt(files, name)
    check_tensors(files, name, weights, TENSORS)
    unknown = sorted(weights.keys() - set(TENSORS))
    if unknown:
        raise FormatError(f"{name} of {files} holds {', '.join(unknown)}, which no SAE of Qwen-Scope has.")
    tensors = {key: weights[key] for key in TENSORS}
    tensors["W_dec"] = tensors["W_dec"].mT if tensors["W_dec"].ndim == 2 else tensors["W_dec"]
    state = complete_state(files, tensors)
    num_latents, hidden_size = state["W_enc"].shape
    refuse_disagreement(files, "num_latents (by its name)", 1024 * int(repo["width"]), name, num_latents)
    if not 0 < int(repo["k"]) <= num_latents:
        raise FormatError(f"{files} has {num_latents} latents, and by its name k={repo['k']} of them are active.")
    notes: list[str] = []
    arguments = {
        "hidden_size": hidden_size,
        "num_latents": num_latents,
        "prefix_sizes": single_level(prefix_sizes, num_latents, files, notes),
        "k": int(repo["k"]),
        "activation": "topk",
        "inference": "topk",
        "apply_b_dec_to_input": False,
        "base_model": f"Qwen/{repo['model']}",
        "site": f"layers.{layer[1]}:output",
    }
    return ConvertedCheckpoint(LIBRARY, arguments, state, notes)


def outline(files: Files) -> Outline:
    """What the names of the repo and of the file chosen say. Raises `FormatError` for another place."""
    layer = _FILE.fullmatch(PurePosixPath(files.chosen or _only_layer(files)).name)
    repo = _named(files)
    site = f"layers.{layer[1]}:output" if layer is not None else None
    num_latents = 1024 * int(repo["width"])
    return outlined(
        lambda: single_level(None, num_latents, files, []),
        base_model=f"Qwen/{repo['model']}",
        site=site,
        num_latents=num_latents,
    )


def _named(files: Files) -> re.Match[str]:
    """What the repo's name says. Raises `FormatError` where it says nothing, and for places that are unknown."""
    place = (Path(files.source) / files.subfolder).resolve().as_posix() if files.is_local else str(files)
    repo = _REPO.search(place)
    if repo is None:
        raise FormatError(
            f"{files} is not named as Qwen-Scope's repos are (SAE-Res-Qwen3-1.7B-Base-W32K-L0_50), and only the name "
            "says k and the language model: give the repo, or name the folder after it."
        )
    if repo["place"] != "Res":
        raise FormatError(
            f"{files} is of the place {repo['place']!r}; only 'Res', the residual stream after a layer, is known here."
        )
    return repo


def _only_layer(files: Files) -> str:
    layers = _layers(files)
    if len(layers) == 1:
        return layers[0]
    raise FormatError(
        f"{files} holds the SAEs of {len(layers)} layers; choose one with subfolder=: {', '.join(layers)}."
    )
