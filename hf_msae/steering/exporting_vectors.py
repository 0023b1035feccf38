"""A steering as a file that another program adds to the model's activations: llama.cpp, lm-evaluation-harness."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_msae.atomic_files import atomic_file
from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.sites import Site, resolve_site
from hf_msae.steering.exporting import check_finite, check_free, constant_shifts, layer_before
from hf_msae.steering.gates import SteeringError
from hf_msae.steering.saved import Steering

TORCH_SUFFIXES = (".pt", ".pth")


def export_gguf(
    model: PreTrainedModel,
    saes: MatryoshkaSAE | Mapping[str, MatryoshkaSAE],
    steering: Steering,
    path: str | Path,
) -> Path:
    """Write a steering as a control vector of llama.cpp (`llama-cli --control-vector FILE`), of strength 1.

    The file's architecture is "controlvector". Its tensors are direction.1 to direction.(layers - 1), one float32
    vector each, which llama.cpp adds to the output of the layer of that number, counted from 0. It has none for layer
    0. Layers that are not steered get zeros, because some readers want every layer.

    Args:
        model: The language model; without its weights will do (`language_models.outline_of`).
        saes: The SAE, or several by the names that the edits use.
        steering: What is done.
        path: The file, which must not exist yet.

    Returns:
        The path.

    Raises:
        SteeringError: The steering is no constant shift, or not one of the residual stream behind a layer from 1.
        OutputExistsError: Where something is at `path` already.
        InputError: The package gguf is not installed.
    """
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise InputError("Control vectors are written with the package gguf: pip install 'hf-msae[gguf]'") from error

    check_free(path)
    shifts = constant_shifts(model, saes, steering)
    check_finite(shifts)
    config = model.config.get_text_config()
    by_layer: dict[int, Tensor] = {}
    for site, shift in shifts.items():
        layer = layer_before(model, site)
        if layer is None or layer == 0:
            raise SteeringError(
                f"llama.cpp adds control vectors to the output of layers 1 … {config.num_hidden_layers - 1}, and the "
                f"steering acts at {site}. Export a model instead, or steer another site."
            )
        _check_width(shift, site, model)
        by_layer[layer] = by_layer.get(layer, torch.zeros(())) + shift.float()
    with atomic_file(path) as draft:
        writer = GGUFWriter(draft, "controlvector")
        writer.add_string("controlvector.model_hint", config.model_type)
        writer.add_uint32("controlvector.layer_count", config.num_hidden_layers - 1)
        for layer in range(1, config.num_hidden_layers):
            vector = by_layer.get(layer, torch.zeros(config.hidden_size))
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Path(path)


def export_lm_eval(
    model: PreTrainedModel,
    saes: MatryoshkaSAE | Mapping[str, MatryoshkaSAE],
    steering: Steering,
    path: str | Path,
) -> Path:
    """Write a steering for lm-evaluation-harness (`lm_eval --model steered --model_args steer_path=FILE,...`).

    The file holds, for each module by its path in the base model, an object with the "action" "add", the
    "steering_vector" (hidden_size,), and a "steering_coefficient" of 1. `torch.load(weights_only=True)` reads it.

    Args:
        model: The language model; without its weights will do (`language_models.outline_of`).
        saes: The SAE, or several by the names that the edits use.
        steering: What is done.
        path: The file, in .pt or .pth, which must not exist yet.

    Returns:
        The path.

    Raises:
        SteeringError: The steering is no constant shift, or it acts at the input of a module that is no layer.
        OutputExistsError: Where something is at `path` already.
        InputError: The path has another suffix.
    """
    if Path(path).suffix not in TORCH_SUFFIXES:
        raise InputError(f"lm-evaluation-harness reads steerings from .pt or .pth files, got {path}.")
    check_free(path)
    shifts = constant_shifts(model, saes, steering)
    check_finite(shifts)
    by_hookpoint: dict[str, Tensor] = {}
    for site, shift in shifts.items():
        hookpoint = _hookpoint(model, site)
        if layer_before(model, site) is not None:
            _check_width(shift, site, model)
        by_hookpoint[hookpoint] = by_hookpoint.get(hookpoint, torch.zeros(())) + shift.float()
    content = {
        hookpoint: {
            "action": "add",
            "steering_vector": vector,
            "steering_coefficient": 1.0,
            "bias": None,
            "head_index": None,
        }
        for hookpoint, vector in by_hookpoint.items()
    }
    with atomic_file(path) as draft:
        torch.save(content, draft)
    return Path(path)


def _hookpoint(model: PreTrainedModel, site: Site) -> str:
    """The module whose output is the site, by its path in the base model."""
    path = site.path
    if site.io == "input":
        layer = layer_before(model, site)
        if layer is None:
            raise SteeringError(
                f"lm-evaluation-harness adds to what modules return, and the steering acts at {site}, which is no "
                "layer's output. Export a model instead, or steer another site."
            )
        path = resolve_site(model, f"layers.{layer}").path
    return path.removeprefix(f"{model.base_model_prefix}.")


def _check_width(shift: Tensor, site: Site, model: PreTrainedModel) -> None:
    width = model.config.get_text_config().hidden_size
    if len(shift) != width:
        raise SteeringError(
            f"the steering's vector has {len(shift)} dimensions, but the activations at {site} of "
            f"{model.config.name_or_path or 'the model'} have {width}. Give the model that the SAE was made for."
        )
