"""SAELens: `cfg.json` and `sae_weights.safetensors`, read in all three of their generations, and written.

- The inference form of version 6 and later is what people publish. Matryoshka and BatchTopK SAEs become "jumprelu"
  there, and their nesting survives in the metadata only.
- The training form of version 6 is a checkpoint: a scalar `topk_threshold`, latents measured in units of the decoder
  rows' norms (`rescale_acts_by_decoder_norm`), and the scaling or whitening of the activations in files beside.
- Before version 6 the configuration was flat and its names were others.

Whatever is linear is folded into the weights, in float64, so that latents and reconstruction are those of SAELens for
raw activations. What is not (a norm or a layer norm of every activation, a gate) has no equal here and is refused.

Written is the inference form, which `sae_lens.SAE.load_from_disk` reads. Its metadata, which SAELens keeps whatever it
holds, has what `read` needs to give the same SAE back (see `round_trip`).
"""

import json
import re
from collections.abc import Sequence
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
    outlined,
    peek_json,
    read_json,
    read_safetensors,
    refuse_disagreement,
    refuse_many,
    released_prefix_sizes,
    single_level,
    target_k,
)
from hf_msae.formats.round_trip import KEY, describe, recorded_places, restore
from hf_msae.formats.saelens_folding import CONFIG, FACTORS, fold
from hf_msae.formats.saelens_names import origin, written_origin
from hf_msae.modeling import MatryoshkaSAE

LIBRARY = "SAELens"
WEIGHTS, SPARSITY = "sae_weights.safetensors", "sparsity.safetensors"
FILES = (WEIGHTS,)
# The version whose inference form is written: SAELens reads a configuration without one, or an older one, as flat.
FORM_VERSION = "6.0.0"

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What the encoder of each architecture does, by the name that it was trained under.
ACTIVATIONS = {
    "standard": "relu",
    "topk": "topk",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
    "jumprelu": "jumprelu",
}
# Those that map one place to another, and whether they have a linear skip beside.
TRANSCODERS = {
    "transcoder": ("relu", False),
    "skip_transcoder": ("relu", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
REFUSED = {
    "gated": "its latents are switched on by a gate with weights of its own, not by their activation",
    "temporal": "it reads the tokens before, too, and this library's SAEs read one token at a time",
    "matching_pursuit": "it encodes in a loop of selections, not in one product",
    "abstopk": "its latent activations may be negative",
}
FOLDED_NORMS = ("none", "expected_average_only_in", "covariance_whitening")
REFUSED_NORMS = {
    "layer_norm": "every activation is centred and divided by its own standard deviation",
    "constant_norm_rescale": "every activation is divided by its own norm",
}
OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
# SAELens adds it to firing rates before it takes the logarithm.
SMALLEST_RATE = 1e-10


def recognises(files: Files) -> bool:
    """Whether there is a SAELens checkpoint, here or in a folder below; sparsify's cfg.json says no `d_sae`."""
    paths = [PurePosixPath(name) for name in files.names]
    configs, weights = ({path.parent for path in paths if path.name == name} for name in (CONFIG, WEIGHTS))
    return not configs.isdisjoint(weights) or "d_sae" in peek_json(files, CONFIG)


def read(files: Files, prefix_sizes: Sequence[int] | None = None) -> ConvertedCheckpoint:
    """The checkpoint in our terms.

    `prefix_sizes` where the nesting is not recorded: an inference form of a Matryoshka SAE written before SAELens kept
    its training details, or by somebody else.
    Raises `FormatError` for files that do not belong together, and for what has no equal here, with the reason.
    """
    refuse_many(files, CONFIG, LIBRARY)
    if WEIGHTS not in files.names:
        raise FormatError(f"{files} has a SAELens {CONFIG} but no {WEIGHTS} beside it.")
    settings = _settings(files, read_json(files, CONFIG))
    tensors = _state(files, settings)
    transcoder = settings["architecture"] in TRANSCODERS
    state = complete_state(files, tensors, tensors["b_dec"].numel() if transcoder else None)
    notes = fold(files, settings, state)
    metadata = settings["metadata"]
    facts = metadata.get(KEY)
    config = _shape(files, settings, state, prefix_sizes, notes)
    # Of an SAE of ours it is known where the activations come from, whatever TransformerLens calls that.
    config |= origin(metadata, notes if facts is None else [])
    config, state = restore(files, facts, config, state, notes)
    return ConvertedCheckpoint(LIBRARY, config, state, notes)


def outline(files: Files) -> Outline:
    """What `cfg.json` says. Raises `FormatError` for what has no equal here."""
    settings = _settings(files, read_json(files, CONFIG))
    num_latents = settings.get("d_sae")
    places = origin(settings["metadata"], []) | recorded_places(settings["metadata"].get(KEY))
    known = {name: places.get(name) for name in ("base_model", "site", "site_out")}
    if not isinstance(num_latents, int):
        return Outline(**known)
    details = settings["metadata"].get("training_architecture_details") or {}
    return outlined(
        lambda: _nesting(files, settings, details, None, num_latents, []), num_latents=num_latents, **known
    )


def write(sae: MatryoshkaSAE, folder: str | Path) -> None:
    """Write SAELens' inference form into a new or empty folder, whole or not at all.

    `sae_lens.SAE.load_from_disk` gives the same latents and reconstruction, for the whole dictionary: SAELens has no
    prefixes, but the metadata keeps their sizes. Raises `FileExistsError` where something is in the folder.
    """
    architecture = _written_architecture(sae)
    tensors = {
        "W_enc": sae.W_enc.detach().T,
        "W_dec": sae.W_dec.detach(),
        "b_enc": sae.b_enc.detach(),
        "b_dec": sae.b_dec.detach(),
    }
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.detach()
    if architecture.startswith("jumprelu"):
        tensors["threshold"] = _rounded_down(sae.threshold.detach(), sae.W_enc.dtype)
    with atomic_folder(folder) as new:
        save_file(_on_cpu(tensors), new / WEIGHTS, metadata={"format": "pt"})
        if sae.firing_rate.any():
            save_file(_on_cpu({"sparsity": torch.log10(sae.firing_rate + SMALLEST_RATE)}), new / SPARSITY)
        config = _written_config(sae, architecture)
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


# Reading


def _settings(files: Files, raw: dict[str, Any]) -> dict[str, Any]:
    """The configuration in the words of version 6, whatever its version; refuses what has no equal here.

    `metadata` also holds the keys of the top level, which is where older files have them.
    """
    metadata = raw.get("metadata") or {}
    version = metadata.get("sae_lens_version") or raw.get("sae_lens_version")
    settings = {"architecture": "standard"} | (raw if _is_current(version) else _old_settings(files, raw))
    settings["metadata"] = {"is_current": _is_current(version)} | settings | metadata
    _refuse_what_has_no_equal(files, settings)
    return settings


def _is_current(version: Any) -> bool:
    major = re.match(r"\d+", str(version or ""))
    return major is not None and int(major[0]) >= 6


def _old_settings(files: Files, raw: dict[str, Any]) -> dict[str, Any]:
    settings = {OLD_NAMES.get(key, key): value for key, value in raw.items()}
    activation = settings.get("activation_fn") or "relu"
    if activation == "topk":
        settings |= {"architecture": "topk", "k": (settings.get("activation_fn_kwargs") or {}).get("k")}
    elif activation != "relu":
        raise FormatError(f"{files} uses the activation {activation!r}; only relu and topk have an equal here.")
    normalisation = settings.get("normalize_activations")
    if isinstance(normalisation, bool):
        settings["normalize_activations"] = "expected_average_only_in" if normalisation else "none"
    return settings


def _refuse_what_has_no_equal(files: Files, settings: dict[str, Any]) -> None:
    architecture, metadata = settings["architecture"], settings["metadata"]
    writes_elsewhere = metadata.get("hook_name_out") not in (None, metadata.get("hook_name"))
    if writes_elsewhere and architecture not in TRANSCODERS:
        raise FormatError(
            f"{files} is a SAELens {architecture} that writes {metadata['hook_name_out']}; its transcoders are "
            f"{', '.join(TRANSCODERS)}."
        )
    if architecture in REFUSED:
        raise FormatError(f"{files} is a SAELens {architecture}, which has no equal here: {REFUSED[architecture]}.")
    known = {**ACTIVATIONS, **TRANSCODERS}
    if architecture not in known:
        raise FormatError(
            f"{files} is a SAELens {architecture!r}, which is not known here; known are {', '.join(known)}."
        )
    normalisation = settings.get("normalize_activations") or "none"
    if architecture in TRANSCODERS and normalisation != "none":
        raise FormatError(
            f"{files} is a transcoder with normalize_activations={normalisation!r}; SAELens scales what such a one "
            "reads and not what it writes, and only transcoders of raw activations are read here."
        )
    if normalisation not in FOLDED_NORMS:
        what = REFUSED_NORMS.get(normalisation, "what it does is not known here")
        raise FormatError(
            f"{files} was trained with normalize_activations={normalisation!r}: {what}, which cannot be folded into "
            "weights, and this library's SAEs read raw activations."
        )


def _state(files: Files, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors in our orientation, and in the dtype of the configuration, to which SAELens converts them, too.

    The threshold so is the number that SAELens compares with.
    """
    tensors, architecture = read_safetensors(files, WEIGHTS), settings["architecture"]
    thresholds = []
    if architecture in BATCH_TOPK:
        thresholds = ["topk_threshold"]
    elif architecture.startswith("jumprelu"):
        # Checkpoints of before version 6 may store its logarithm.
        thresholds = ["log_threshold" if "log_threshold" in tensors else "threshold"]
    skip = ["W_skip"] if TRANSCODERS.get(architecture, ("", False))[1] else []
    needed = ["W_enc", "W_dec", "b_enc", "b_dec", *thresholds, *skip]
    check_tensors(files, WEIGHTS, tensors, needed)
    unknown = sorted(tensors.keys() - {*needed, *FACTORS})
    if unknown:
        raise FormatError(f"{WEIGHTS} of {files} holds {', '.join(unknown)}, which no {architecture} SAE has.")
    for name, size in zip(("d_in", "d_sae"), tensors["W_enc"].shape, strict=False):
        refuse_disagreement(files, name, settings.get(name), WEIGHTS, size)
    if architecture in TRANSCODERS:
        refuse_disagreement(files, "d_out", settings.get("d_out"), WEIGHTS, tensors["b_dec"].numel())
    dtype = DTYPES.get(str(settings.get("dtype")).removeprefix("torch."), tensors["W_enc"].dtype)
    state = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    state["W_enc"] = state["W_enc"].T
    for name in thresholds:
        threshold = state.pop(name)
        state["threshold"] = threshold.exp() if name == "log_threshold" else threshold
    if SPARSITY in files.names:
        state["firing_rate"] = _firing_rate(files)
    return state


def _firing_rate(files: Files) -> Tensor:
    sparsity = read_safetensors(files, SPARSITY)
    check_tensors(files, SPARSITY, sparsity, ["sparsity"])
    rate = 10 ** sparsity["sparsity"].double()
    # A latent that never fired is zero again, whatever a logarithm in single precision made of it.
    rate = (rate - SMALLEST_RATE).where(rate > 1.001 * SMALLEST_RATE, 0.0)
    return rate.clamp_max(1).float()


def _shape(
    files: Files,
    settings: dict[str, Any],
    state: dict[str, Tensor],
    given: Sequence[int] | None,
    notes: list[str],
) -> dict[str, Any]:
    """The part of the configuration that says what is computed."""
    architecture, metadata = settings["architecture"], settings["metadata"]
    num_latents, hidden_size = state["W_enc"].shape
    details = metadata.get("training_architecture_details") or {}
    trained_as = metadata.get("training_architecture")
    ranked = architecture == "topk"
    # An inference form is named after what it does, and only its metadata say how it came to do it.
    name = trained_as if architecture == "jumprelu" and trained_as in ACTIVATIONS else architecture
    activation = TRANSCODERS[name][0] if name in TRANSCODERS else ACTIVATIONS[name]
    if name in TRANSCODERS and trained_as in ACTIVATIONS:
        activation = ACTIVATIONS[trained_as]
    k = settings.get("k") if ranked else settings.get("k") or details.get("k") or metadata.get("l0")
    if not ranked:
        k = target_k(k, num_latents, notes)
    elif not isinstance(k, (int, float)) or not 0 < k <= num_latents or k != round(k):
        raise FormatError(
            f"{CONFIG} of {files} says architecture topk, so its k should be a whole number up to {num_latents}, but "
            f"it is {k!r}."
        )
    return {
        "hidden_size": hidden_size,
        "num_latents": num_latents,
        "prefix_sizes": _nesting(files, settings, details, given, num_latents, notes),
        "k": round(k) if activation == "topk" else k,
        "activation": activation,
        "inference": "topk" if ranked else "threshold",
        "apply_b_dec_to_input": architecture not in TRANSCODERS and bool(settings.get("apply_b_dec_to_input", True)),
        "hidden_size_out": state["W_dec"].shape[1] if architecture in TRANSCODERS else None,
        "skip": "W_skip" in state,
    }


def _nesting(
    files: Files,
    settings: dict[str, Any],
    details: dict[str, Any],
    given: Sequence[int] | None,
    num_latents: int,
    notes: list[str],
) -> list[int]:
    recorded = settings.get("matryoshka_widths") or details.get("matryoshka_widths")
    trained_as = settings["metadata"].get("training_architecture")
    if recorded is not None or "matryoshka_batchtopk" in (settings["architecture"], trained_as):
        return chosen_prefix_sizes(recorded, given, num_latents, files, notes)
    if given is None and (trained_as is not None or settings["architecture"] != "jumprelu"):
        return list(released_prefix_sizes(num_latents, files, notes) or [num_latents])
    return single_level(given, num_latents, files, notes)


# Writing


def _written_architecture(sae: MatryoshkaSAE) -> str:
    by_threshold = sae.config.activation != "relu" or bool(sae.threshold.any())
    if sae.config.is_transcoder:
        if sae.config.inference == "topk":
            raise InputError(
                "SAELens has no transcoders that keep the k largest of each token. Train with inference='threshold', "
                "or export it to sparsify (to_sparsify)."
            )
        return f"{'jumprelu_' if by_threshold else ''}{'skip_' if sae.config.skip else ''}transcoder"
    if sae.config.inference == "topk":
        return "topk"
    return "jumprelu" if by_threshold else "standard"


def _rounded_down(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest numbers of `dtype` not above the thresholds: values of that dtype exceed either or both."""
    rounded = threshold.to(dtype)
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.double() > threshold.double(), below, rounded)


def _written_config(sae: MatryoshkaSAE, architecture: str) -> dict[str, Any]:
    config = sae.config
    trained_as = {activation: name for name, activation in reversed(ACTIVATIONS.items())}[config.activation]
    if config.activation == "batch_topk" and config.num_levels > 1:
        trained_as = "matryoshka_batchtopk"
    return {
        "architecture": architecture,
        "d_in": config.hidden_size,
        "d_sae": config.num_latents,
        **({"d_out": config.output_size} if config.is_transcoder else {}),
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **({"k": round(config.k), "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
        "metadata": {
            "sae_lens_version": FORM_VERSION,
            "sae_lens_training_version": None,
            "training_architecture": trained_as,
            "training_architecture_details": {"k": config.k, "matryoshka_widths": list(config.prefix_sizes)},
            **written_origin(config),
            KEY: describe(sae),
        },
    }
