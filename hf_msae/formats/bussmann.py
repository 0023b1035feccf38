"""The original Matryoshka SAE code: `sae.pt`, and `config.json` with values as strings.

It is bartbussmann/matryoshka_sae, and BatchTopK before it.

`sae_type` says the class. No other key does: `group_sizes` is in every configuration, since one configuration is
copied for all SAEs of a run. Of the classes only the vanilla one uses the encoder bias that all of them store, unless
`use_encoder_bias` says so. Activations are normalised by each token's own mean and norm where `input_unit_norm` is
set, which no weights can take over.
"""

import ast
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

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
    outlined,
    read_json,
    refuse_disagreement,
    refuse_many,
    single_level,
    target_k,
)
from hf_msae.formats.saelens_names import model_on_hub, site_of_hook
from hf_msae.formats.safe_pickle import read_pt

LIBRARY = "matryoshka_sae"
WEIGHTS = "sae.pt"
CONFIG = "config.json"
FILES = (WEIGHTS,)
# What the classes of the plain SAEs do here, by `sae_type`.
PLAIN = {"batch-topk": "batch_topk", "topk": "topk", "vanilla": "relu"}
PROCESSING = (
    "The original code runs the language model in TransformerLens. Where that centred the weights that write into the "
    "residual stream, as it does by default for models with LayerNorm, each activation of the Hub's model must have "
    "its mean subtracted first."
)


def recognises(files: Files) -> bool:
    """Whether this folder, or one below it, holds a `sae.pt`."""
    return holds(files, WEIGHTS)


def read(files: Files, prefix_sizes: Sequence[int] | None = None) -> ConvertedCheckpoint:
    """Read a checkpoint folder.

    Raises `FormatError` for the JumpReLU class, for `input_unit_norm`, tied weights and activations other than relu,
    for pickles with code in them, and where configuration and tensors disagree.
    """
    refuse_many(files, WEIGHTS, LIBRARY)
    if CONFIG not in files.names:
        raise FormatError(f"{files} holds {WEIGHTS}, but no {CONFIG} beside it, which says k and the normalisation.")
    config = _literals(read_json(files, CONFIG))
    nested = _is_matryoshka(files, config)
    _refuse_options(files, config)
    activation = "batch_topk" if nested else PLAIN[config["sae_type"]]
    weights = read_pt(files, WEIGHTS)
    check_tensors(files, WEIGHTS, weights, ["W_enc", "W_dec", "b_enc", "b_dec", *(["threshold"] if nested else [])])
    notes = [PROCESSING]
    biased = activation == "relu" or config.get("use_encoder_bias") is True
    state = complete_state(files, _oriented(weights, activation, biased, notes))
    num_latents, hidden_size = state["W_enc"].shape
    refuse_disagreement(files, "act_size", config.get("act_size"), WEIGHTS, hidden_size)
    if not nested:
        refuse_disagreement(files, "dict_size", config.get("dict_size"), WEIGHTS, num_latents)
        sizes = single_level(prefix_sizes, num_latents, files, notes)
    else:
        sizes = chosen_prefix_sizes(_groups(files, config, num_latents), prefix_sizes, num_latents, files, notes)
    if "threshold" in state and not state["threshold"].any():
        notes.append(
            "Its threshold is zero, so every positive pre-activation is active, as in the original code. Set one with "
            "`hf-msae convert --measure`, or call calibrate_threshold on activations of its site."
        )
    base_model = _base_model(config)
    arguments = {
        "hidden_size": hidden_size,
        "num_latents": num_latents,
        "prefix_sizes": sizes,
        "k": target_k(None, num_latents, notes) if activation == "relu" else _k(files, config),
        "activation": activation,
        "inference": "topk" if activation == "topk" else "threshold",
        "apply_b_dec_to_input": True,
        "base_model": base_model,
        "site": _site(config, base_model, notes),
        "context_length": config.get("seq_len"),
    }
    uncalibrated = activation == "batch_topk" and "threshold" not in state
    return ConvertedCheckpoint(LIBRARY, arguments, state, notes, uncalibrated)


def outline(files: Files) -> Outline:
    """What `config.json` says. Raises `FormatError` for what has no equal here."""
    config = _literals(read_json(files, CONFIG))
    nested = _is_matryoshka(files, config)
    _refuse_options(files, config)
    base_model, groups = _base_model(config), config.get("group_sizes")
    # Of a nested one `dict_size` says nothing.
    num_latents = config.get("dict_size") if not nested else sum(groups) if isinstance(groups, list) else None
    known: dict[str, Any] = {"base_model": base_model, "site": _site(config, base_model, [])}
    known["num_latents"] = num_latents
    if num_latents is None:
        return Outline(**known)
    if nested:
        return outlined(lambda: _groups(files, config, num_latents), **known)
    return outlined(lambda: single_level(None, num_latents, files, []), **known)


def _base_model(config: Mapping[str, Any]) -> str | None:
    name = config.get("model_name")
    return model_on_hub(name) or name if isinstance(name, str) else None


def _literals(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that were turned into strings, as Python literals; strings that are none, such as names, stay."""
    return {key: _literal(value) if isinstance(value, str) else value for key, value in config.items()}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _is_matryoshka(files: Files, config: Mapping[str, Any]) -> bool:
    """Whether the class is a nested one. Raises `FormatError` for classes that cannot be read."""
    kind = config.get("sae_type")
    if isinstance(kind, str) and "matryoshka" in kind.lower():
        return True
    if kind not in PLAIN:
        raise FormatError(
            f"{files} has sae_type={kind!r}; of this code's SAEs, the Matryoshka classes and {', '.join(PLAIN)} can "
            "be read."
        )
    return False


def _refuse_options(files: Files, config: Mapping[str, Any]) -> None:
    """Raises `FormatError` for options under which the same tensors compute something else."""
    if config.get("input_unit_norm") is not False:
        raise FormatError(
            f"{files} has input_unit_norm={config.get('input_unit_norm')}: each token is normalised by its own mean "
            "and norm before encoding and scaled back after decoding. No weights can take that over, and "
            "MatryoshkaSAE does not do it; only SAEs trained with input_unit_norm=False can be read."
        )
    if config.get("tied_weights") is True:
        raise FormatError(f"{files} has tied_weights=True, so its decoder is not the W_dec that its files hold.")
    if config.get("activation", "relu") != "relu":
        raise FormatError(f"{files} has activation={config['activation']!r}; only 'relu' has an equal here.")


def _oriented(weights: Mapping[str, Tensor], activation: str, biased: bool, notes: list[str]) -> dict[str, Tensor]:
    if not biased and weights["b_enc"].any():
        notes.append("Its encoder bias is not zero, but the original code never uses it, so it was read as zero.")
    W_enc = weights["W_enc"]
    tensors = {
        "W_enc": W_enc.mT if W_enc.ndim == 2 else W_enc,
        "W_dec": weights["W_dec"],
        "b_enc": weights["b_enc"] if biased else torch.zeros_like(weights["b_enc"]),
        "b_dec": weights["b_dec"],
    }
    if activation == "batch_topk" and "threshold" in weights:
        tensors["threshold"] = weights["threshold"]
    return tensors


def _groups(files: Files, config: Mapping[str, Any], num_latents: int) -> list[int] | None:
    """Prefix sizes from the recorded groups between them; None where they are not recorded."""
    groups = config.get("group_sizes")
    if groups is None:
        return None
    if not isinstance(groups, list) or not groups or not all(isinstance(size, int) and size > 0 for size in groups):
        raise FormatError(f"{CONFIG} of {files} has group_sizes={groups!r}; expected a list such as '[768, 2304]'.")
    if sum(groups) != num_latents:
        raise FormatError(
            f"{files}: group_sizes={groups} sum to {sum(groups)}, but {WEIGHTS} has {num_latents} latents. They do "
            "not belong together; fetch both again."
        )
    return list(accumulate(groups))


def _k(files: Files, config: Mapping[str, Any]) -> int:
    k = config.get("top_k")
    if not isinstance(k, int) or k < 1:
        raise FormatError(f"{CONFIG} of {files} should say top_k, the latents active per token; it has {k!r}.")
    return k


def _site(config: Mapping[str, Any], base_model: str | None, notes: list[str]) -> str | None:
    """Our name of the place, from TransformerLens' name or its parts."""
    hook = config.get("hook_point")
    if not isinstance(hook, str):
        hook = f"blocks.{config.get('layer')}.hook_{config.get('site')}"
    site = site_of_hook(hook, base_model)
    if site is None:
        notes.append(f"The place {hook!r} has no equal that is known here; set config.site.")
    return site
