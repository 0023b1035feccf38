"""A steering as a bias of the language model's weights: the model then needs no hooks, and any program runs it.

Adding a vector to the residual stream behind a layer is what the bias of the layer's last projection does, where
nothing but additions lies between the two. Which modules those are differs between architectures: a norm behind the
MLP, experts, or a second sublayer in parallel change the answer. So it is not looked up but tried: a module is right
if adding a vector to what it returns adds the same vector at the site, whatever the text. Whether the architecture can
have a bias there is tried as well, by switching on each setting of its configuration that is named for biases.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.atomic_files import atomic_folder
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.process_wide import loading
from hf_msae.sites import Site, SiteError, capture, find_output_site, find_site, in_this_thread, replace
from hf_msae.sites.layouts import probe_tokens
from hf_msae.steering.exporting import check_constant, check_finite, constant_shifts
from hf_msae.steering.gates import SteeringError
from hf_msae.steering.saved import Steering

PROBE_LENGTH = 6
CARD = """\
---
base_model: {base}
library_name: transformers
tags:
- steered
---

# {base}, steered

The weights of {base} with a constant vector added to the residual stream by a bias, by the steering "{steering}" of
hf_msae. {description}

| site | bias | length of the vector |
|---|---|---|
{rows}

It acts on every token, special ones included. The other weights are as they were{zeros}.
"""


def export_model(
    model: PreTrainedModel,
    saes: MatryoshkaSAE | Mapping[str, MatryoshkaSAE],
    steering: Steering,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write a language model that is steered by a bias: a folder for `AutoModelForCausalLM.from_pretrained`.

    Its logits are those of the model inside `steering.on(model, saes, special_ids=())`, up to rounding. The model that
    is given stays as it is.

    Args:
        model: The language model, whole, on any device.
        saes: The SAE, or several by the names that the edits use.
        steering: What is done.
        folder: Where to, absent or empty.
        tokenizer: Saved along where it is given.

    Returns:
        The folder.

    Raises:
        SteeringError: The steering is no constant shift; the architecture has no bias that adds to the site; or the
            model is quantised, offloaded or has an adapter inside.
        SiteError: The model does not have the SAE's site, or its activations have another width.
        OutputExistsError: Where something is at `folder` already.
    """
    check_constant(steering)
    if model.training:
        raise SteeringError("the language model is in training mode; call model.eval().")
    weights = model.state_dict()
    if any(weight.is_meta for weight in weights.values()):
        raise SteeringError("the language model's weights are not all in memory; load it without offloading.")
    with atomic_folder(folder) as draft:
        for sae in saes.values() if isinstance(saes, Mapping) else [saes]:
            find_output_site(model, sae.config, find_site(model, sae.config))
        shifts = constant_shifts(model, saes, steering)
        check_finite(shifts)
        bias_of = {site: _find_bias(model, site) for site in shifts}
        biased = _with_biases(model, list(bias_of.values()), weights)
        has_zeros = len(biased.state_dict()) > len(weights)
        _add_weights(biased, weights, bias_of, shifts)
        biased.generation_config = model.generation_config
        biased.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        (draft / "README.md").write_text(_card(model, steering, bias_of, shifts, has_zeros), encoding="utf-8")
    return Path(folder)


def _find_bias(model: PreTrainedModel, site: Site) -> str:
    """The module whose bias adds to the site, such as "model.layers.12.mlp.down_proj".

    Raises:
        SteeringError: There is none.
    """
    found = [path for path in _candidates(model, site) if _adds_to(model, path, site)]
    for path in found:
        if _biased_config(model, model.config, path) is not None:
            return path
    there = f"what adds to it, {found[0]}, cannot have one" if found else "a norm, experts or a routing lies between"
    raise SteeringError(
        f"{type(model).__name__} has no bias that adds a vector to {site}: {there}. Export a file with the vector for "
        "another program instead (gguf, lm-eval), or serve the model with its steering (`hf-msae serve`)."
    )


def _candidates(model: PreTrainedModel, site: Site) -> Iterator[str]:
    """Modules that have a place for a bias, in the layer around the site and in the one before, the last first."""
    parts = site.path.split(".")
    stack = next(
        (at for at in range(len(parts)) if isinstance(model.get_submodule(".".join(parts[:at])), nn.ModuleList)), None
    )
    if stack is None:
        return
    layers = ".".join(parts[:stack])
    numbers = [int(parts[stack])] if site.io == "output" else [int(parts[stack]), int(parts[stack]) - 1]
    for number in numbers:
        inside = [
            name
            for name, module in model.named_modules()
            if name.startswith(f"{layers}.{number}.") and "bias" in module._parameters
        ]
        yield from reversed(inside)


def _adds_to(model: PreTrainedModel, path: str, site: Site) -> bool:
    """Whether a vector that is added to what a module returns is added at the site, on tokens of two texts.

    The vector is as long as the activations, so that rounding is small beside it, and any norm or nonlinearity between
    the two would turn it.
    """
    embedding = next(model.get_input_embeddings().parameters())
    tokens = probe_tokens(model.config.get_text_config().vocab_size, PROBE_LENGTH, embedding.device, draw=0)[0]
    before = capture(model, [site], input_ids=tokens)[site]
    probe = torch.randn(before.shape[-1], generator=torch.Generator().manual_seed(0))
    probe = (probe * before.float().norm(dim=-1).mean().cpu() / probe.norm()).to(before)
    seen = []

    def add(hidden: Tensor) -> Tensor:
        fits = hidden.shape[-1] == len(probe)
        seen.append(fits)
        return hidden + probe if fits else hidden

    try:
        with replace(model, {Site(path): add}, in_this_thread()):
            after = capture(model, [site], input_ids=tokens)[site]
    except SiteError:  # experts, say, which see the tokens in another order
        return False
    error = (after.double() - before.double() - probe.double()).norm(dim=-1)
    scale = before.double().norm(dim=-1) + after.double().norm(dim=-1)
    return any(seen) and bool((error <= 2 * torch.finfo(before.dtype).eps * scale).all())


def _biased_config(model: PreTrainedModel, config: PreTrainedConfig, path: str) -> PreTrainedConfig | None:
    """A configuration like this one with which the architecture has a bias at a module; None where it never has."""
    if _has_bias(_outline(model, config), path):
        return config
    settings = config.get_text_config().to_dict()
    for name, value in settings.items():
        if "bias" not in name or not isinstance(value, bool):
            continue
        other = copy.deepcopy(config)
        setattr(other.get_text_config(), name, not value)
        if _has_bias(_outline(model, other), path):
            return other
    return None


def _outline(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class without numbers."""
    with loading, torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def _has_bias(model: PreTrainedModel, path: str) -> bool:
    try:
        module = model.get_submodule(path)
    except AttributeError:  # an adapter's layer, which the class by itself does not have
        return False
    return module._parameters.get("bias") is not None


def _with_biases(model: PreTrainedModel, paths: Sequence[str], weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model without numbers that has the weights of `model`, and biases at some modules.

    Raises:
        SteeringError: Its weights are not those that the model has, apart from biases.
    """
    config = model.config
    for path in paths:
        config = _biased_config(model, config, path) or config
    biased = _outline(model, config)
    names = biased.state_dict().keys()
    other = (weights.keys() - names) | {name for name in names - weights.keys() if not name.endswith(".bias")}
    if other:
        raise SteeringError(
            f"the weights of this {type(model).__name__} are not those of its class ({sorted(other)[0]}): it is "
            "quantised, or an adapter is in it. Give the whole model, with adapters merged (merge_and_unload)."
        )
    return biased


def _add_weights(
    biased: PreTrainedModel, weights: Mapping[str, Tensor], bias_of: Mapping[Site, str], shifts: Mapping[Site, Tensor]
) -> None:
    """Give a model without numbers those of another, new biases as zeros, and the shifts."""
    filled = dict(weights)
    for name, place in biased.state_dict().items():
        if name not in filled:
            like = weights[name.removesuffix("bias") + "weight"]
            filled[name] = torch.zeros(place.shape, dtype=like.dtype, device=like.device)
    for site, path in bias_of.items():
        bias = filled[f"{path}.bias"]
        filled[f"{path}.bias"] = (bias.float() + shifts[site].to(bias.device, torch.float32)).to(bias.dtype)
    biased.load_state_dict(filled, assign=True)
    biased.tie_weights()


def _card(
    model: PreTrainedModel,
    steering: Steering,
    bias_of: Mapping[Site, str],
    shifts: Mapping[Site, Tensor],
    has_zeros: bool,
) -> str:
    rows = [f"| `{site}` | `{path}.bias` | {shifts[site].norm().item():.4g} |" for site, path in bias_of.items()]
    values: dict[str, Any] = {
        "base": model.config.name_or_path or type(model).__name__,
        "steering": steering.name,
        "description": steering.description,
        "rows": "\n".join(rows),
        "zeros": ", apart from biases of zeros that the configuration brings along" if has_zeros else "",
    }
    return CARD.format(**values)
