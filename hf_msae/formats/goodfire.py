"""Goodfire's open SAEs of Llama: one `.pt` or `.pth` file with `encoder_linear` and `decoder_linear`.

They are ReLU SAEs of the residual stream behind a layer, without nesting, and subtract nothing before encoding. The
language model and the layer stand in the file's name alone (`Llama-3.1-8B-Instruct-SAE-l19.pth`). Which place that is,
and their L0, is as SAELens' table of releases gives it.
"""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from hf_msae.formats.common import (
    ConvertedCheckpoint,
    Files,
    FormatError,
    Outline,
    check_tensors,
    complete_state,
    single_level,
    target_k,
)
from hf_msae.formats.safe_pickle import read_pt

LIBRARY = "Goodfire"
FILES = ("*-SAE-l*.pt", "*-SAE-l*.pth")
TENSORS = {
    "W_enc": "encoder_linear.weight",
    "b_enc": "encoder_linear.bias",
    "W_dec": "decoder_linear.weight",
    "b_dec": "decoder_linear.bias",
}
_FILE = re.compile(r"((Llama-[\w.-]+)-SAE-l(\d+))\.pth?")
L0 = {"Llama-3.1-8B-Instruct-SAE-l19": 91, "Llama-3.3-70B-Instruct-SAE-l50": 121}


def recognises(files: Files) -> bool:
    """Whether this folder holds a file that is named as Goodfire's are."""
    return bool(_named(files))


def _named(files: Files) -> list[str]:
    return [name for name in files.names if _FILE.fullmatch(name)]


def outline(files: Files) -> Outline:
    """What the file's name says; its width stands in the weights alone."""
    match = _FILE.fullmatch(PurePosixPath(files.chosen or (_named(files) or [""])[0]).name)
    return Outline(f"meta-llama/{match[2]}", f"layers.{match[3]}:output") if match is not None else Outline()


def read(files: Files, prefix_sizes: Sequence[int] | None = None) -> ConvertedCheckpoint:
    """Read the SAE.

    Raises `FormatError` where there are several and none was chosen, for another name, and for pickles with code.
    """
    named = _named(files)
    if files.chosen is None and len(named) != 1:
        raise FormatError(f"{files} holds {len(named)} SAEs; choose one with subfolder=: {', '.join(named)}.")
    name = files.chosen or named[0]
    match = _FILE.fullmatch(PurePosixPath(name).name)
    if match is None:
        raise FormatError(
            f"{name} of {files} is not named as Goodfire's files are (Llama-3.1-8B-Instruct-SAE-l19.pth), and only "
            "the name says the language model and the layer."
        )
    weights = read_pt(files, name)
    check_tensors(files, name, weights, list(TENSORS.values()))
    tensors = {ours: weights[theirs] for ours, theirs in TENSORS.items()}
    tensors["W_dec"] = tensors["W_dec"].mT if tensors["W_dec"].ndim == 2 else tensors["W_dec"]
    state = complete_state(files, tensors)
    num_latents, hidden_size = state["W_enc"].shape
    notes: list[str] = []
    arguments = {
        "hidden_size": hidden_size,
        "num_latents": num_latents,
        "prefix_sizes": single_level(prefix_sizes, num_latents, files, notes),
        "k": target_k(L0.get(match[1]), num_latents, notes),
        "activation": "relu",
        "apply_b_dec_to_input": False,
        "base_model": f"meta-llama/{match[2]}",
        "site": f"layers.{match[3]}:output",
    }
    return ConvertedCheckpoint(LIBRARY, arguments, state, notes)
