"""What another library's files cannot hold of an SAE of ours, kept in a key that its reader passes over.

SAELens keeps whatever stands in its metadata, and sparsify drops the keys that it does not know. So an export takes
along, under `KEY`, where the activations came from, how the SAE was trained and what was measured, and reading the
files gives the same SAE back: one that can be steered in units of its maxima, and counts the same tokens.

What the other library computes by (sizes, k, biases) is read from its own fields, which somebody may have changed.
Maxima and rates are those of one set of weights: where the norms of the weights say that these are others now, as
after SAELens folded the decoder's norms into the latents, what was measured is left out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from hf_msae.formats.common import Files, FormatError
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.modeling.untrusted import check_values

KEY = "hf_msae"
VERSION = 1
# What every library's own fields say, and what the weights' shapes do.
COMPUTED = frozenset(
    {"hidden_size", "num_latents", "prefix_sizes", "k", "activation", "inference", "apply_b_dec_to_input"}
    | {"hidden_size_out", "skip"}
)
STATISTICS = ("max_activation", "firing_rate")
# Relative difference of a matrix's norm that rounding to bfloat16 stays far below.
NORM_TOLERANCE = 1e-3


def describe(sae: MatryoshkaSAE, also: Sequence[str] = ()) -> dict[str, Any]:
    """Facts about an SAE, as JSON takes them, for `restore` to read.

    Args:
        sae: The SAE that is exported.
        also: Fields of the configuration and tensors per latent beside the usual ones, which this format cannot hold.

    Returns:
        The configuration's fields other than `COMPUTED`, the norms of the weights, and each tensor per latent that is
        not zero as a list of `num_latents` numbers, exact in single precision.
    """
    config = sae.config
    default = MatryoshkaSAEConfig(**{name: getattr(config, name) for name in COMPUTED})
    names = (MatryoshkaSAEConfig.__annotations__.keys() - COMPUTED) | (set(also) & COMPUTED)
    changed = {name: getattr(config, name) for name in sorted(names)}
    changed = {name: value for name, value in changed.items() if name in also or value != getattr(default, name)}
    tensors = {name: sae.get_buffer(name) for name in STATISTICS}
    tensors |= {name: getattr(sae, name).detach() for name in also if name not in COMPUTED}
    return {
        "version": VERSION,
        "config": changed,
        "norms": _norms(sae.W_enc, sae.W_dec),
        **{name: _numbers(tensor) for name, tensor in tensors.items() if tensor.any()},
    }


def restore(
    files: Files, facts: Any, config: dict[str, Any], state: dict[str, Tensor], notes: list[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and state of a checkpoint with what `describe` wrote into it.

    Args:
        files: Where they come from, for errors.
        facts: What stands under `KEY`; None where nothing does.
        config: What the library's own fields say, in our terms.
        state: What its weights say.
        notes: Sentences for the user, to which those on facts that no longer hold are added.

    Raises:
        FormatError: For facts that are not as `describe` writes them.
    """
    if facts is None:
        return config, state
    where = f"{KEY!r} in the configuration of {files}"
    try:
        if facts["version"] > VERSION:
            notes.append(f"{KEY!r} was written by a later hf_msae and is not read; update hf_msae for all it holds.")
            return config, state
        own = {name: value for name, value in facts["config"].items() if name in MatryoshkaSAEConfig.__annotations__}
        # An SAE of ours that came from a third library, or from none, did not come from this one.
        own = config | {"converted_from": None} | own
        MatryoshkaSAEConfig(**own)
        known = {*STATISTICS, "threshold"} & facts.keys()
        tensors = {name: torch.tensor(facts[name], dtype=torch.float32) for name in known}
        check_values(tensors, where)
        same = _are_close(facts["norms"], _norms(state["W_enc"], state["W_dec"]))
    except StrictDataclassError as error:
        raise FormatError(_unreadable(where, error.__cause__ or error)) from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise FormatError(_unreadable(where, error)) from error
    if same and all(tensor.shape == state["b_enc"].shape for tensor in tensors.values()):
        return own, state | tensors
    notes.append(
        "Its weights are not those that hf_msae exported, so the maxima, rates and numbers measured then were left "
        "out. `hf-msae convert --measure` measures them anew."
    )
    computed = {name: value for name, value in config.items() if name in COMPUTED}
    return own | computed | {"measured": None}, state


def recorded_places(facts: Any) -> dict[str, Any]:
    """What `describe` wrote of the language model and its sites, without the weights; empty where nothing readable is.

    Args:
        facts: What stands under `KEY`.
    """
    config = facts.get("config") if isinstance(facts, Mapping) and facts.get("version") == VERSION else None
    if not isinstance(config, Mapping):
        return {}
    return {name: config[name] for name in ("base_model", "site", "site_out") if isinstance(config.get(name), str)}


def _unreadable(where: str, problem: object) -> str:
    return f"{where} is not as hf_msae writes it ({problem}). Export the SAE again, or take that key out."


def _numbers(tensor: Tensor) -> list[float]:
    """The shortest decimal numbers that are these in single precision."""
    return [float(str(number)) for number in tensor.float().cpu().numpy().astype(np.float32)]


def _norms(W_enc: Tensor, W_dec: Tensor) -> dict[str, float]:
    return {"W_enc": W_enc.detach().double().norm().item(), "W_dec": W_dec.detach().double().norm().item()}


def _are_close(recorded: Mapping[str, float], found: Mapping[str, float]) -> bool:
    return all(math.isclose(recorded[name], norm, rel_tol=NORM_TOLERANCE) for name, norm in found.items())
