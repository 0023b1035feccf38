"""Loading a language model by its name.

This is which class of transformers it needs, what its checkpoint must have held, and the PEFT adapter on it.
transformers fills whatever a checkpoint lacks with random numbers. A random head would still give a cross-entropy, so
a model without the weights of its head is loaded without a head; random layers would be trained on, so they are
refused.

A PEFT adapter (a folder or a repo with an `adapter_config.json`) is loaded onto the model that it names. What is
returned is that model with the adapter's layers inside, not PEFT's wrapper around it: so it generates, is steered and
is captured as any model of transformers is. An SAE of it records both names.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)
from transformers.utils import cached_file, find_adapter_config_file
from transformers.utils.hub import extract_commit_hash

from hf_msae.adapters import read_adapter, with_adapter
from hf_msae.errors import HfMsaeError, InputError
from hf_msae.model_names import HUB_OPTIONS, Origin, options_of_files, place_of, some_of
from hf_msae.modeling import MatryoshkaSAEConfig
from hf_msae.process_wide import loading
from hf_msae.quantization import quantizing_options
from hf_msae.worlds.stories import STORIES

logger = logging.getLogger(__name__)

# What transformers raises for files that are absent, damaged, of an unknown architecture, or in need of a package that
# is not installed.
LOADING_ERRORS = (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError)


_ORIGINS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()


def load_language_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    needs_head: bool = False,
    quantization: str | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model in evaluation mode, and its tokenizer.

    It has its head where that predicts the next token and was saved.

    Args:
        name: A Hub id or a folder, of a model or of a PEFT adapter on one; or "stories" for the story model, which
            ships with the package.
        revision: Branch, tag or commit of a Hub repo.
        dtype: Precision in which the model runs; "auto" is the one it was saved in.
        trust_remote_code: Run code that comes with the model.
        needs_head: Refuse a model without a head, which could write no text.
        quantization: "4bit" or "8bit" has bitsandbytes quantize the linear layers as they are loaded; None leaves the
            model as it was saved.
        options: What else `from_pretrained` takes, such as `device_map` or `token`.

    Raises:
        InputError: There is no such model, layers or embeddings were not saved or have other shapes than the
            configuration says, it has an encoder that cannot be loaded alone, it lacks a head that is needed, it
            cannot be quantized here, or the adapter is damaged or does not fit.
    """
    hub = {option: options[option] for option in HUB_OPTIONS if option in options}
    hub |= {"revision": revision, "trust_remote_code": trust_remote_code}
    origin, of_model = _find(name, hub)
    if origin.adapter is not None and options.keys() & {"tp_plan", "distributed_config"}:
        raise InputError(
            f"{name} is a PEFT adapter, and tensor parallelism splits plain models only: merge it into its model "
            "(merge_and_unload) and give the merged one."
        )
    config = _load_config(origin, of_model)
    if quantization is not None:
        options |= quantizing_options(quantization, str(name), config, dtype, options)
    try:
        tokenizer = _load_tokenizer(origin, hub)
        # Others' models are made after this one: see `process_wide.loading`.
        with loading:
            model = _load_weights(place_of(origin.name), config, dtype=dtype, **{**options, **of_model})
            if origin.adapter is not None:
                model = with_adapter(model, origin, hub)
    except HfMsaeError:
        raise
    except LOADING_ERRORS as error:
        raise InputError(f"Cannot load the model {str(name)!r}: {error}") from error
    except RuntimeError as error:
        if quantization is None:
            raise
        raise InputError(
            f"bitsandbytes cannot quantize {str(name)!r} to {quantization} on this device ({error!s:.300}); load it "
            "as it is (--quantization none)."
        ) from error
    if needs_head and model.get_output_embeddings() is None:
        raise InputError(
            f"The model {str(name)!r} was saved without a head that predicts the next token, so it can write no text. "
            "Save or fetch it with its head."
        )
    if origin.name == STORIES:
        model.config.name_or_path = STORIES
    _ORIGINS[model] = _at_commits(origin, hub)
    return model.eval(), tokenizer


def load_language_model_config(name: str | Path, **hub: Any) -> PreTrainedConfig:
    """The configuration of a language model, named as for [`load_language_model`].

    Of an adapter, it is that of the model below it. `hub` is of `from_pretrained`.

    Raises:
        InputError: There is no such model.
    """
    return _load_config(*_find(name, hub))


def load_tokenizer(name: str | Path, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model alone, named as for [`load_language_model`].

    `hub` is of `from_pretrained`.

    Raises:
        InputError: There is no such model, or it has no tokenizer.
    """
    return _load_tokenizer(_find(name, hub)[0], hub)


def outline_of(name: str | Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration without its weights: its modules, and their shapes.

    Args:
        name: The language model, for messages.
        config: Its own.
    """
    auto_class = _auto_class(name, config, trust_remote_code=False)
    with loading, torch.device("meta"):
        return cast(PreTrainedModel, auto_class.from_config(config, trust_remote_code=False))


def count_parameters(name: str | Path, config: PreTrainedConfig) -> int:
    """Parameters of the model of a configuration, counted before any weight is fetched."""
    return int(outline_of(name, config).num_parameters())


def model_of(config: MatryoshkaSAEConfig) -> tuple[str | None, str | None]:
    """The name of the language model that an SAE reads, and its revision: those of the adapter where there is one.

    Returns:
        As `load_language_model` takes them; two times None where the SAE does not say.
    """
    if config.adapter is not None:
        return config.adapter, config.adapter_revision
    return config.base_model, config.base_model_revision


def model_to_load(config: MatryoshkaSAEConfig, source: str | Path, given: str | None = None) -> tuple[str, str | None]:
    """The name of the language model that is given, or else of the one that an SAE reads, and its revision.

    Args:
        config: of the SAE.
        source: what a message calls it.
        given: a model that goes before the SAE's.

    Raises:
        InputError: None is given, and the SAE does not say which one it reads.
    """
    name, revision = (given, None) if given else model_of(config)
    if name is None:
        raise InputError(f"{source} does not say which language model it is of; give --model.")
    return name, revision


def origin_of(model: nn.Module) -> Origin | None:
    """Where a model came from that was loaded here; None for any other."""
    return _ORIGINS.get(model)


def _find(name: str | Path, hub: Mapping[str, Any]) -> tuple[Origin, dict[str, Any]]:
    """What a name stands for; and what Hub calls for the model are given, the one below the adapter if it is one."""
    name, place = str(name), place_of(name)
    if name.startswith((".", "/", "~")) and not os.path.exists(place):
        raise InputError(f"There is no model at {name}. Give a folder that holds a config.json, or a Hub id.")
    revision = hub.get("revision")
    of_files = options_of_files(hub)
    try:
        is_adapter = find_adapter_config_file(place, **of_files) is not None
    except LOADING_ERRORS as error:
        raise InputError(f"Cannot load the model {name!r}: {error}") from error
    if not is_adapter:
        return Origin(name, revision), dict(hub)
    origin = read_adapter(name, of_files)
    return origin, {**hub, "revision": origin.revision}


def _load_config(origin: Origin, hub: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(place_of(origin.name), **hub)
    except LOADING_ERRORS as error:
        below = f", the model of the adapter {origin.adapter}" if origin.adapter else ""
        raise InputError(f"Cannot load the model {origin.name!r}{below}: {error}") from error


def _load_tokenizer(origin: Origin, hub: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The adapter's tokenizer where it has one, else the model's."""
    name, options = origin.name, {**hub, "revision": origin.revision}
    if origin.adapter is not None and _has_file(origin.adapter, "tokenizer_config.json", hub):
        name, options = origin.adapter, dict(hub)
    try:
        return AutoTokenizer.from_pretrained(place_of(name), **options)
    except ValueError as error:
        first = str(error).split("\n", 1)[0]
        raise InputError(
            f"Cannot load a tokenizer of the model {name!r}; it needs its tokenizer.json beside it. ({first})"
        ) from error


def _has_file(name: str, file: str, hub: Mapping[str, Any]) -> bool:
    try:
        return cached_file(place_of(name), file, revision=hub.get("revision"), token=hub.get("token")) is not None
    except OSError:
        return False


def _at_commits(origin: Origin, hub: Mapping[str, Any]) -> Origin:
    """The origin with the commits that were loaded, read from where files lie in the local cache."""

    def commit(name: str, file: str, revision: str | None) -> str | None:
        if name == STORIES or os.path.isdir(place_of(name)):
            return None
        return extract_commit_hash(cached_file(name, file, revision=revision, token=hub.get("token")), None)

    found = replace(origin, revision=commit(origin.name, "config.json", origin.revision))
    if origin.adapter is None:
        return found
    return replace(found, adapter_revision=commit(origin.adapter, "adapter_config.json", origin.adapter_revision))


def _load_weights(name: str, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The model of a checkpoint; `options` are of `from_pretrained`."""
    auto_class = _auto_class(name, config, options["trust_remote_code"])
    model, found = auto_class.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    missing = set(found["missing_keys"])
    wrong = {str(key[0] if isinstance(key, tuple) else key) for key in found["mismatched_keys"]}
    head = model.get_output_embeddings()
    of_head = set() if head is None else {id(parameter) for parameter in head.parameters()}
    random = {key for key, parameter in model.named_parameters() if id(parameter) in of_head} & (missing | wrong)
    needed = {key for key in missing - random if _is_needed(model, key)} | (wrong - random)
    if needed:
        raise InputError(
            f"The weights of {name} do not belong to its configuration, a {type(model).__name__}: {some_of(needed)} "
            "would be random numbers. Save or fetch the model again, whole."
        )
    if missing - random:
        logger.warning("%s lacks %s; they are random, and nothing here reads them.", name, some_of(missing - random))
    if random:
        logger.warning("%s lacks the weights of its head (%s): no cross-entropy is measured.", name, some_of(random))
        # A class that does not name its base model cannot be asked for it.
        return model.base_model if model.base_model is not model else AutoModel.from_pretrained(name, **options)
    return model


def _auto_class(name: str | Path, config: PreTrainedConfig, trust_remote_code: bool) -> Any:
    kind, architectures = config.model_type, set(config.architectures or ())
    values = config.to_dict()
    if config.is_encoder_decoder or architectures & set(_names(MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, kind)):
        if kind not in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
            raise InputError(
                f"{name} is an encoder–decoder ({kind}), which needs text for both; hf_msae reads models with one "
                "stack of layers. In Python, hand a part of it, such as model.get_encoder(), to SAETrainer."
            )
        logger.warning("%s is an encoder–decoder (%s); its encoder alone is loaded.", name, kind)
        return AutoModelForTextEncoding
    if any(architecture.endswith("ForMaskedLM") for architecture in architectures):
        return AutoModel
    if trust_remote_code and values.get("auto_map"):
        return AutoModelForCausalLM if "AutoModelForCausalLM" in values["auto_map"] else AutoModel
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and values.get("is_decoder") is False:
        return AutoModel
    with_images = _names(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, kind)
    if with_images and (kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or architectures & set(with_images)):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel


def _names(mapping: Any, kind: str) -> tuple[str, ...]:
    """The classes that a mapping of transformers has for a model type: none, one or several."""
    names = mapping.get(kind, ())
    return (names,) if isinstance(names, str) else tuple(names)


def _is_needed(model: PreTrainedModel, key: str) -> bool:
    """Whether a parameter takes part in the activations: it is in a stack of layers or in the token embedding."""
    path, embedding = key.rpartition(".")[0], model.get_input_embeddings()
    of_embedding = any(name == path and module is embedding for name, module in model.named_modules())
    return of_embedding or any(part.isdigit() for part in path.split("."))
