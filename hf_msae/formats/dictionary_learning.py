"""dictionary_learning's trainer folders: `ae.pt`, and beside it `config.json` with what its trainer was given.

The library has two layouts. `MatryoshkaBatchTopKSAE` and `JumpReluAutoEncoder` keep plain matrices, W_enc (d, F) and
W_dec (F, d); the other classes keep `nn.Linear`s, encoder.weight (F, d) and decoder.weight (d, F), under the same
names for different functions. So the class that the configuration names is checked against the tensors, and where only
it can tell two classes apart it is needed.

While training, the library writes `checkpoints/ae_STEP.pt`, whose configuration lies one folder up; one of those is
read where it is named.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_msae.formats.common import (
    ConvertedCheckpoint,
    Files,
    FormatError,
    Outline,
    check_tensors,
    chosen_prefix_sizes,
    complete_state,
    holds,
    in_one_dtype,
    outlined,
    plain_names,
    read_json,
    refuse_disagreement,
    refuse_many,
    single_level,
    target_k,
)
from hf_msae.formats.safe_pickle import read_pt

LIBRARY = "dictionary_learning"
WEIGHTS = "ae.pt"
CONFIG = "config.json"
# Weights of a finished trainer, and of one in training.
FILES = (WEIGHTS, "ae_*.pt")
NAMED_FILES = 12

_SUBMODULE = re.compile(r"(resid_post|resid_pre|resid|mlp|mlp_out|attn|attn_out|attention)_(?:layer_)?(\d+)")
_SITES = {
    "resid_post": "layers.{}",
    "resid": "layers.{}",
    "resid_pre": "layers.{}:input",
    "mlp": "layers.{}.mlp",
    "mlp_out": "layers.{}.mlp",
    "attn": "layers.{}.attn",
    "attn_out": "layers.{}.attn",
    "attention": "layers.{}.attn",
}

_PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}


class _Kind(NamedTuple):
    """One of the library's classes: its activation here, its tensors by our names, and what only it has."""

    activation: str
    tensors: dict[str, str]
    also: tuple[str, ...] = ()
    apply_b_dec_to_input: bool = True


KINDS = {
    "MatryoshkaBatchTopKSAE": _Kind("batch_topk", _PLAIN, ("k", "threshold", "group_sizes")),
    "JumpReluAutoEncoder": _Kind("jumprelu", _PLAIN, ("threshold",), apply_b_dec_to_input=False),
    "BatchTopKSAE": _Kind("batch_topk", _LINEAR | {"b_dec": "b_dec"}),
    "AutoEncoderTopK": _Kind("topk", _LINEAR | {"b_dec": "b_dec"}),
    "AutoEncoder": _Kind("relu", _LINEAR | {"b_dec": "bias"}),
    "AutoEncoderNew": _Kind("relu", _LINEAR | {"b_dec": "decoder.bias"}, apply_b_dec_to_input=False),
}
# Trainers of this library record either class for the other; their tensors tell them apart.
RENAMED = ("AutoEncoder", "AutoEncoderNew")


def recognises(files: Files) -> bool:
    """Whether this folder, or one below it, holds an `ae.pt`, or one of a trainer's checkpoints."""
    return bool(_weights(files))


def _weights(files: Files) -> list[str]:
    return [name for name in files.names if any(PurePosixPath(name).match(pattern) for pattern in FILES)]


def read(files: Files, prefix_sizes: Sequence[int] | None = None) -> ConvertedCheckpoint:
    """Read a trainer folder, one of its checkpoints, or a backup of one that was still training.

    Raises `FormatError` for gated SAEs, for pickles with code in them, and where configuration and tensors disagree.
    """
    name = files.chosen or WEIGHTS
    if files.chosen is None:
        _refuse_choice(files)
    config = _config(files)
    weights, trainer, notes = _unwrapped(files, read_pt(files, name), config.get("trainer"))
    if not isinstance(trainer, dict):
        raise FormatError(f"{CONFIG} of {files} should have an object under 'trainer', but has {trainer!r}.")
    kind_name = _class_name(files, weights, trainer.get("dict_class"))
    kind = KINDS[kind_name]
    check_tensors(files, name, weights, [*kind.tensors.values(), *kind.also])
    state = _state(files, weights, kind)
    _check_sizes(files, trainer, state)
    num_latents, hidden_size = state["W_enc"].shape
    buffer = config.get("buffer") or {}
    arguments = {
        "hidden_size": hidden_size,
        "num_latents": num_latents,
        "activation": kind.activation,
        "inference": "topk" if kind.activation == "topk" else "threshold",
        "apply_b_dec_to_input": kind.apply_b_dec_to_input,
        "base_model": trainer.get("lm_name"),
        "context_length": buffer.get("ctx_len"),
        "site": _site(trainer, buffer, files, notes),
        "k": _k(files, weights, trainer, kind, num_latents, notes),
    }
    if kind_name == "MatryoshkaBatchTopKSAE":
        recorded = _recorded_sizes(files, weights, trainer, num_latents)
        arguments["prefix_sizes"] = chosen_prefix_sizes(recorded, prefix_sizes, num_latents, files, notes)
    else:
        arguments["prefix_sizes"] = single_level(prefix_sizes, num_latents, files, notes)
    batch_topk = kind.activation == "batch_topk"
    if batch_topk and "threshold" in weights and float(weights["threshold"]) < 0:
        notes.append(
            "Its threshold was never estimated (training stopped before threshold_start_step), so every positive "
            "pre-activation is active, as in the library itself. Set one with `hf-msae convert --measure`, or call "
            "calibrate_threshold on activations of its site."
        )
    if kind_name == "AutoEncoder":
        state = _normalise_decoder(state, notes)
    return ConvertedCheckpoint(
        LIBRARY, arguments, state, notes, uncalibrated=batch_topk and "threshold" not in weights
    )


def outline(files: Files) -> Outline:
    """What `config.json` says. Raises `FormatError` for gated SAEs and transcoders."""
    config = _config(files)
    trainer, buffer = config.get("trainer"), config.get("buffer") or {}
    if not isinstance(trainer, dict):
        return Outline()
    if trainer.get("dict_class") == "GatedAutoEncoder":
        raise FormatError(_gated(files))
    num_latents, groups = trainer.get("dict_size"), trainer.get("group_sizes")
    # Where they are not written here, they are in the weights.
    nested = list(accumulate(groups)) if isinstance(groups, list) else None
    plain = trainer.get("dict_class") != "MatryoshkaBatchTopKSAE" and isinstance(num_latents, int)
    return outlined(
        lambda: single_level(None, int(num_latents or 0), files, []) if plain else nested,
        base_model=trainer.get("lm_name"),
        site=_site(trainer, buffer, files, []),
        num_latents=num_latents,
    )


def _gated(files: Files) -> str:
    return f"{files} is a gated SAE, whose two encoders have no equal in MatryoshkaSAE."


def _refuse_choice(files: Files) -> None:
    """Raises `FormatError` that lists what to choose from, where there is no `ae.pt` in this very folder."""
    if WEIGHTS in files.names:
        return
    if holds(files, WEIGHTS):
        refuse_many(files, WEIGHTS, LIBRARY)
    found = sorted(_weights(files), key=_step)
    more = f" and {len(found) - NAMED_FILES} more" if len(found) > NAMED_FILES else ""
    last = (PurePosixPath(files.subfolder) / found[-1]).as_posix()
    how = f"{files.source}/{last}" if files.is_local else f"subfolder={last!r}"
    raise FormatError(
        f"{files} holds no {WEIGHTS}, but {len(found)} checkpoint(s) of a trainer: {', '.join(found[:NAMED_FILES])}"
        f"{more}. Give one of them, such as {how}."
    )


def _step(name: str) -> tuple[str, int]:
    number = re.search(r"_(\d+)\.pt$", name)
    return str(PurePosixPath(name).parent), int(number[1]) if number is not None else 0


def _config(files: Files) -> dict[str, Any]:
    """The trainer's configuration: beside the weights, or in the trainer's folder."""
    beside = (PurePosixPath(files.chosen or WEIGHTS).parent / CONFIG).as_posix()
    name = next((name for name in (beside, CONFIG) if name in files.names), None)
    return read_json(files, name) if name is not None else {}


def _unwrapped(files: Files, content: dict[str, Any], trainer: Any) -> tuple[dict[str, Tensor], Any, list[str]]:
    """The SAE's tensors in units of raw activations, the trainer's configuration, and notes.

    A backup written during training holds the SAE beside its optimizer, and the factor by which activations were
    divided, which the library multiplies into biases and threshold when training ends.
    """
    if "ae" not in content or not isinstance(content["ae"], dict):
        return content, trainer or {}, []
    weights = plain_names(content["ae"])
    notes = [f"This is a backup written at step {content.get('step')}, before training ended."]
    factor = content.get("norm_factor")
    if factor is not None:
        scaled = ("b_enc", "b_dec", "bias", "encoder.bias", "decoder.bias", "threshold")
        for name in scaled:
            # A single threshold below zero is the mark of one never estimated.
            if name in weights and (name != "threshold" or weights[name].ndim or weights[name] >= 0):
                # In half precision the product would be rounded.
                exact = weights[name].double() * float(factor)
                weights[name] = exact.to(torch.promote_types(weights[name].dtype, torch.float32))
        notes.append(
            f"It was trained on activations divided by {float(factor):.6g}, which was folded into the biases."
        )
    return weights, trainer or content.get("config") or {}, notes


def _class_name(files: Files, weights: Mapping[str, Tensor], recorded: str | None) -> str:
    """The library's class, from the tensors' names and from what the configuration records; both must agree."""
    if "r_mag" in weights or recorded == "GatedAutoEncoder":
        raise FormatError(_gated(files))
    candidates = [name for name, kind in KINDS.items() if {*kind.tensors.values(), *kind.also} <= weights.keys()]
    if "MatryoshkaBatchTopKSAE" in candidates:
        candidates = ["MatryoshkaBatchTopKSAE"]  # it has all tensors of a JumpReLU SAE, too
    if recorded is None and len(candidates) == 1:
        return candidates[0]
    if recorded in candidates:
        return recorded
    if recorded in RENAMED and len(candidates) == 1 and candidates[0] in RENAMED:
        return candidates[0]
    if recorded is None and candidates:
        raise FormatError(
            f"The tensors of {files} may be those of {' or '.join(candidates)}, which only config.json can tell; put "
            "it beside ae.pt."
        )
    held = ", ".join(sorted(map(str, weights))) or "nothing"
    if recorded in KINDS and candidates:
        raise FormatError(
            f"{files}: config.json says dict_class={recorded!r}, but {files.chosen or WEIGHTS} holds the tensors of "
            f"{' or '.join(candidates)} ({held}). They do not belong together; fetch both again."
        )
    raise FormatError(
        f"{files} has dict_class={recorded!r} and the tensors {held}; of {LIBRARY}'s classes, {', '.join(KINDS)} can "
        "be read."
    )


def _state(files: Files, weights: Mapping[str, Tensor], kind: _Kind) -> dict[str, Tensor]:
    tensors = {ours: weights[theirs] for ours, theirs in kind.tensors.items()}
    if any(not isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise FormatError(f"{WEIGHTS} of {files} holds something other than tensors under {', '.join(tensors)}.")
    # One of the two matrices is the transpose of ours in either layout.
    transposed = "W_enc" if kind.tensors["W_enc"] == "W_enc" else "W_dec"
    tensors[transposed] = tensors[transposed].mT if tensors[transposed].ndim == 2 else tensors[transposed]
    if "threshold" in weights:
        tensors["threshold"] = torch.as_tensor(weights["threshold"])
    return complete_state(files, tensors)


def _check_sizes(files: Files, trainer: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    num_latents, hidden_size = state["W_enc"].shape
    refuse_disagreement(files, "dict_size", trainer.get("dict_size"), WEIGHTS, num_latents)
    refuse_disagreement(files, "activation_dim", trainer.get("activation_dim"), WEIGHTS, hidden_size)


def _k(
    files: Files,
    weights: Mapping[str, Tensor],
    trainer: Mapping[str, Any],
    kind: _Kind,
    num_latents: int,
    notes: list[str],
) -> float:
    if kind.activation not in ("topk", "batch_topk"):
        return target_k(trainer.get("target_l0"), num_latents, notes)
    if "k" in weights:
        k = int(weights["k"])
        refuse_disagreement(files, "k", trainer.get("k"), WEIGHTS, k)
        return k
    if trainer.get("k") is None:
        raise FormatError(f"Neither {WEIGHTS} nor {CONFIG} of {files} says k, the latents active per token.")
    return int(trainer["k"])


def _recorded_sizes(
    files: Files, weights: Mapping[str, Tensor], trainer: Mapping[str, Any], num_latents: int
) -> list[int]:
    """Prefix sizes: the library records the groups between them."""
    groups = weights["group_sizes"].tolist()
    refuse_disagreement(files, "group_sizes", trainer.get("group_sizes"), WEIGHTS, groups)
    if sum(groups) != num_latents or min(groups) < 1:
        raise FormatError(
            f"{files}: group_sizes={groups} should be positive and sum to the {num_latents} latents of {WEIGHTS}."
        )
    return list(accumulate(groups))


def _site(trainer: Mapping[str, Any], buffer: Mapping[str, Any], files: Files, notes: list[str]) -> str | None:
    """Our name of the submodule. `layer` alone is no site: users count from the embeddings or from the first layer."""
    submodule, layer, side = trainer.get("submodule_name"), trainer.get("layer"), buffer.get("io", "out")
    if side == "in_and_out":
        raise FormatError(f"{files} is a transcoder (io='in_and_out'), which has no equal in MatryoshkaSAE.")
    match = _SUBMODULE.fullmatch(submodule) if isinstance(submodule, str) else None
    if match is not None and isinstance(layer, int):
        refuse_disagreement(files, "layer", layer, "submodule_name", int(match[2]))
    if match is None:
        notes.append(
            f"The site is not recorded in a way that can be resolved (submodule_name={submodule!r}, layer={layer!r}); "
            "set config.site."
        )
        return None
    site = _SITES[match[1]].format(match[2])
    return f"{site}:input" if side == "in" and not site.endswith(":input") else site


def _normalise_decoder(state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Bring decoder rows to norm 1, as the library's own loader does.

    The encoder is scaled instead, so nothing else changes than the units of the latents.
    """
    norms = state["W_dec"].double().norm(dim=1)
    if torch.allclose(norms, torch.ones_like(norms)):
        return state
    # A row of zeros has no direction; its latent keeps its units.
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    exact = in_one_dtype(state, torch.float64)
    exact |= {
        "W_dec": exact["W_dec"] / norms[:, None],
        "W_enc": exact["W_enc"] * norms[:, None],
        "b_enc": exact["b_enc"] * norms,
    }
    notes.append("Decoder rows were brought to norm 1 and the encoder scaled to match, as the library's loader does.")
    kept = torch.promote_types(state["W_dec"].dtype, torch.float32)
    return {name: tensor.to(kept) for name, tensor in exact.items()}
