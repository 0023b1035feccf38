"""The original Matryoshka SAE code (bartbussmann/matryoshka_sae): `sae.pt`, and `config.json` with values as strings.

Its Matryoshka class never uses the encoder bias it stores, so it is read as zero. Activations are normalised by each
token's own mean and norm where `input_unit_norm` is set, which no weights can take over.
"""

import ast
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hf_msae.hub.formats.common import (
    Files,
    Foreign,
    FormatError,
    check_tensors,
    chosen_prefix_sizes,
    complete_state,
    holds,
    read_json,
    refuse_disagreement,
    refuse_many,
)
from hf_msae.hub.formats.saelens_names import model_on_hub, site_of_hook
from hf_msae.hub.formats.safe_pickle import read_pt

LIBRARY = "matryoshka_sae"
WEIGHTS = "sae.pt"
CONFIG = "config.json"
PROCESSING = (
    "The original code runs the language model in TransformerLens. Where that centred the weights that write into the "
    "residual stream, as it does by default for models with LayerNorm, each activation of the Hub's model must have "
    "its mean subtracted first."
)


def recognises(files: Files) -> bool:
    """Whether this folder, or one below it, holds a `sae.pt`."""
    return holds(files, WEIGHTS)


def read(files: Files, prefix_sizes: Sequence[int] | None = None) -> Foreign:
    """Read a checkpoint folder of a Matryoshka SAE.

    Raises `FormatError` for the plain SAEs of the same code, for `input_unit_norm`, for pickles with code in them, and
    where configuration and tensors disagree.
    """
    refuse_many(files, WEIGHTS, LIBRARY)
    if CONFIG not in files.names:
        raise FormatError(f"{files} holds {WEIGHTS}, but no {CONFIG} beside it, which says k and the normalisation.")
    config = _literals(read_json(files, CONFIG))
    _refuse_kinds(files, config)
    weights = read_pt(files, WEIGHTS)
    check_tensors(files, WEIGHTS, weights, ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
    notes = [PROCESSING]
    state = complete_state(files, _oriented(weights, notes))
    num_latents, hidden_size = state["W_enc"].shape
    refuse_disagreement(files, "act_size", config.get("act_size"), WEIGHTS, hidden_size)
    if not state["threshold"].any():
        notes.append(
            "Its threshold is zero, so every positive pre-activation is active, as in the original code. Call "
            "calibrate_threshold on activations of its site."
        )
    model_name = config.get("model_name")
    base_model = model_on_hub(model_name) or model_name if isinstance(model_name, str) else None
    arguments = {
        "hidden_size": hidden_size,
        "num_latents": num_latents,
        "prefix_sizes": chosen_prefix_sizes(_groups(files, config, num_latents), prefix_sizes, num_latents, files),
        "k": _k(files, config),
        "activation": "batch_topk",
        "apply_b_dec_to_input": True,
        "base_model": base_model,
        "site": _site(config, base_model, notes),
        "context_length": config.get("seq_len"),
    }
    return Foreign(LIBRARY, arguments, state, notes)


def _literals(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that were turned into strings, as Python literals; strings that are none, such as names, stay."""
    return {key: _literal(value) if isinstance(value, str) else value for key, value in config.items()}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _refuse_kinds(files: Files, config: Mapping[str, Any]) -> None:
    kind = config.get("sae_type")
    if "group_sizes" not in config and "matryoshka" not in str(kind).lower():
        raise FormatError(
            f"{files} has sae_type={kind!r} and no group_sizes; of this code's SAEs, only the Matryoshka class can be "
            "read."
        )
    if config.get("input_unit_norm") is not False:
        raise FormatError(
            f"{files} has input_unit_norm={config.get('input_unit_norm')}: each token is normalised by its own mean "
            "and norm before encoding and scaled back after decoding. No weights can take that over, and "
            "MatryoshkaSAE does not do it; only SAEs trained with input_unit_norm=False can be read."
        )


def _oriented(weights: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    if weights["b_enc"].any():
        notes.append("Its encoder bias is not zero, but the original code never uses it, so it was read as zero.")
    W_enc = weights["W_enc"]
    return {
        "W_enc": W_enc.mT if W_enc.ndim == 2 else W_enc,
        "W_dec": weights["W_dec"],
        "b_enc": torch.zeros_like(weights["b_enc"]),
        "b_dec": weights["b_dec"],
        "threshold": weights["threshold"],
    }


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
