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
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
    BitsAndBytesConfig,
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
from transformers.utils import cached_file, find_adapter_config_file, is_bitsandbytes_available, is_peft_available
from transformers.utils.hub import extract_commit_hash

from hf_msae.errors import HfMsaeError, InputError
from hf_msae.modeling import MatryoshkaSAEConfig
from hf_msae.process_wide import loading
from hf_msae.worlds.stories import STORIES, story_lm_path

logger = logging.getLogger(__name__)
# Options of `from_pretrained` that configuration, tokenizer and weights all take.
HUB_OPTIONS = ("token", "cache_dir", "local_files_only")
# To how many bits bitsandbytes takes a model's linear layers as it is loaded.
QUANTIZATIONS = ("4bit", "8bit")

# What transformers raises for files that are absent, damaged, of an unknown architecture, or in need of a package that
# is not installed.
LOADING_ERRORS = (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError)


@dataclass(frozen=True)
class Origin:
    """Where a language model came from.

    Args:
        name: The model, or the one below the adapter: a Hub id, a folder or "stories".
        revision: Its branch, tag or commit as it was asked for; once it is loaded, the commit where it is known.
        adapter: The PEFT adapter on it, if there is one.
        adapter_revision: As `revision`, of the adapter.
    """

    name: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None


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
        options |= _quantizing(quantization, str(name), config, dtype, options)
    try:
        tokenizer = _load_tokenizer(origin, hub)
        # Others' models are made after this one: see `process_wide.loading`.
        with loading:
            model = _load_weights(_place(origin.name), config, dtype=dtype, **{**options, **of_model})
            if origin.adapter is not None:
                model = _with_adapter(model, origin, hub)
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


def _quantizing(
    quantization: str, name: str, config: PreTrainedConfig, dtype: str | torch.dtype, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What `from_pretrained` must be told to quantize a model. Raises `InputError` where that cannot be."""
    if quantization not in QUANTIZATIONS:
        raise InputError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}.")
    saved = config.to_dict().get("quantization_config")
    if saved is not None:
        if _bits(saved) == quantization:
            return {}
        raise InputError(
            f"The model {name!r} was saved quantized ({_bits(saved) or saved.get('quant_method')}), so it cannot be "
            f"loaded in {quantization}: leave the quantization out, or give the model that it was made from."
        )
    if options.keys() & {"tp_plan", "distributed_config"}:
        raise InputError("A quantized model cannot be split by tensor parallelism; give one of the two.")
    if not is_bitsandbytes_available():
        raise InputError(
            f"To load {name!r} in {quantization} needs bitsandbytes, which is not installed: pip install "
            "bitsandbytes, or load it as it is (--quantization none)."
        )
    if quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    # Products are computed in the precision of the rest of the model; bitsandbytes' default is float32.
    computing = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": computing}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **four)}


def _bits(quantization_config: Mapping[str, Any]) -> str | None:
    """Which of `QUANTIZATIONS` a model's configuration has; None for other methods."""
    return next((bits for bits in QUANTIZATIONS if quantization_config.get(f"load_in_{bits}")), None)


def quantization_of(model: PreTrainedModel) -> str | None:
    """To how many bits bitsandbytes has quantized a model, as `load_language_model` takes it; None for any other."""
    return _bits(model.config.to_dict().get("quantization_config") or {})


def quantization_to_load(config: MatryoshkaSAEConfig) -> str | None:
    """The quantization in which an SAE's language model is read: that of its training, where it can be had.

    Where bitsandbytes is not installed, the model is read as it was saved, and a warning says so.
    """
    return quantization_to_be_had(
        config.base_model_quantization,
        f"The SAE was trained on {config.base_model}",
        "its activations differ somewhat",
    )


def quantization_to_be_had(quantization: str | None, whose: str, otherwise: str) -> str | None:
    """A quantization that was recorded, or None, with a warning, where bitsandbytes is not installed.

    Args:
        quantization: "4bit", "8bit" or None.
        whose: The beginning of the warning, such as "The SAE was trained on gpt2".
        otherwise: What then is.
    """
    if quantization is None or is_bitsandbytes_available():
        return quantization
    logger.warning(
        "%s in %s. bitsandbytes is not installed, so the model is read as it was saved, and %s (pip install "
        "bitsandbytes).",
        whose,
        quantization,
        otherwise,
    )
    return None


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


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT has put an adapter on a model, in whatever way."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, PeftModel | BaseTunerLayer) for module in model.modules())


def _find(name: str | Path, hub: Mapping[str, Any]) -> tuple[Origin, dict[str, Any]]:
    """What a name stands for; and what Hub calls for the model are given, the one below the adapter if it is one."""
    name, place = str(name), _place(name)
    if name.startswith((".", "/", "~")) and not os.path.exists(place):
        raise InputError(f"There is no model at {name}. Give a folder that holds a config.json, or a Hub id.")
    revision = hub.get("revision")
    of_files = {option: hub[option] for option in ("revision", *HUB_OPTIONS) if option in hub}
    try:
        is_adapter = find_adapter_config_file(place, **of_files) is not None
    except LOADING_ERRORS as error:
        raise InputError(f"Cannot load the model {name!r}: {error}") from error
    if not is_adapter:
        return Origin(name, revision), dict(hub)
    origin = _read_adapter(name, of_files)
    return origin, {**hub, "revision": origin.revision}


def _load_config(origin: Origin, hub: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(_place(origin.name), **hub)
    except LOADING_ERRORS as error:
        below = f", the model of the adapter {origin.adapter}" if origin.adapter else ""
        raise InputError(f"Cannot load the model {origin.name!r}{below}: {error}") from error


def _place(name: str | Path) -> str:
    """What `from_pretrained` takes for a name."""
    return str(story_lm_path()) if name == STORIES else os.path.expanduser(name)


def _load_tokenizer(origin: Origin, hub: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The adapter's tokenizer where it has one, else the model's."""
    name, options = origin.name, {**hub, "revision": origin.revision}
    if origin.adapter is not None and _has_file(origin.adapter, "tokenizer_config.json", hub):
        name, options = origin.adapter, dict(hub)
    try:
        return AutoTokenizer.from_pretrained(_place(name), **options)
    except ValueError as error:
        first = str(error).split("\n", 1)[0]
        raise InputError(
            f"Cannot load a tokenizer of the model {name!r}; it needs its tokenizer.json beside it. ({first})"
        ) from error


def _has_file(name: str, file: str, hub: Mapping[str, Any]) -> bool:
    try:
        return cached_file(_place(name), file, revision=hub.get("revision"), token=hub.get("token")) is not None
    except OSError:
        return False


def _at_commits(origin: Origin, hub: Mapping[str, Any]) -> Origin:
    """The origin with the commits that were loaded, read from where files lie in the local cache."""

    def commit(name: str, file: str, revision: str | None) -> str | None:
        if name == STORIES or os.path.isdir(_place(name)):
            return None
        return extract_commit_hash(cached_file(name, file, revision=revision, token=hub.get("token")), None)

    found = replace(origin, revision=commit(origin.name, "config.json", origin.revision))
    if origin.adapter is None:
        return found
    return replace(found, adapter_revision=commit(origin.adapter, "adapter_config.json", origin.adapter_revision))


def _read_adapter(name: str, hub: Mapping[str, Any]) -> Origin:
    """What an adapter stands on. Raises `InputError` for one that is not inside the model's layers."""
    if not is_peft_available():
        raise InputError(f"{name} is a PEFT adapter, and peft is not installed: pip install peft.")
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(_place(name), **hub)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"The adapter_config.json of {name} cannot be read: {error!s:.200}") from error
    if not config.base_model_name_or_path:
        raise InputError(
            f"The adapter {name} does not say which model it belongs to; write base_model_name_or_path into its "
            "adapter_config.json."
        )
    if not os.path.isdir(_place(name)) and os.path.exists(_place(config.base_model_name_or_path)):
        # Somebody else's file must not open folders of this machine.
        raise InputError(
            f"The adapter {name} comes from the Hub, and the model that it names ({config.base_model_name_or_path}) "
            "is a folder here. Download the adapter into a folder, or leave the directory that holds the other."
        )
    if config.is_prompt_learning:
        raise InputError(
            f"The adapter {name} ({config.peft_type.value}) puts vectors before the text, which are no tokens whose "
            "activations could be read; give the model below it, or an adapter inside its layers, such as LoRA."
        )
    return Origin(config.base_model_name_or_path, config.revision, name, hub.get("revision"))


def _with_adapter(model: PreTrainedModel, origin: Origin, hub: Mapping[str, Any]) -> PreTrainedModel:
    """The model with an adapter in its layers. Its head is left out where the adapter was trained for another."""
    from peft import PeftModel, TaskType
    from peft.utils import load_peft_weights

    name, options = (
        str(origin.adapter),
        {option: hub[option] for option in ("revision", *HUB_OPTIONS) if option in hub},
    )
    before = {id(parameter) for parameter in model.parameters()}
    try:
        keys = load_peft_weights(_place(name), device="cpu", **options).keys()
        place = next((one for one in (model, model.base_model) if _has_modules(one, keys)), None)
        if place is None:
            raise InputError(f"it is made for modules that a {type(model).__name__} does not have")
        # What the adapter's file lacks stays without memory, and so is found.
        found = PeftModel.from_pretrained(place, _place(name), low_cpu_mem_usage=True, **options)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(
            f"The adapter {name} does not fit {origin.name}: {error!s:.300}. Check base_model_name_or_path in its "
            "adapter_config.json, or merge it into its model (merge_and_unload) and give the merged one."
        ) from error
    lost = {key for key, parameter in place.named_parameters() if parameter.is_meta and id(parameter) not in before}
    if lost:
        raise InputError(f"The adapter {name} lacks {_some(lost)}; save or fetch it again, whole.")
    adapted: Any = found.get_base_model()
    if found.active_peft_config.task_type in (None, TaskType.CAUSAL_LM):
        return cast(PreTrainedModel, adapted)
    logger.warning("%s was trained for %s: no cross-entropy is measured.", name, found.active_peft_config.task_type)
    return cast(PreTrainedModel, adapted.base_model)


def _has_modules(model: nn.Module, keys: Iterable[str]) -> bool:
    """Whether an adapter's weights belong to modules that are there; those of a head that was trained may not."""
    roots = {name for name, _ in model.named_children()}
    return any(key.removeprefix("base_model.model.").partition(".")[0] in roots for key in keys)


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
            f"The weights of {name} do not belong to its configuration, a {type(model).__name__}: {_some(needed)} "
            "would be random numbers. Save or fetch the model again, whole."
        )
    if missing - random:
        logger.warning("%s lacks %s; they are random, and nothing here reads them.", name, _some(missing - random))
    if random:
        logger.warning("%s lacks the weights of its head (%s): no cross-entropy is measured.", name, _some(random))
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


def _some(keys: set[str]) -> str:
    shown = ", ".join(sorted(keys)[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"
