"""Loading a language model by its name: which class of transformers it needs, and what its checkpoint must have held.

transformers fills whatever a checkpoint lacks with random numbers. A random head would still give a cross-entropy, so
a model without the weights of its head is loaded without a head; random layers would be trained on, so they are
refused.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
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

from hf_msae.errors import HfMsaeError, InputError
from hf_msae.process_wide import loading
from hf_msae.worlds.stories import STORIES, story_lm_path

logger = logging.getLogger(__name__)
# Options of `from_pretrained` that configuration, tokenizer and weights all take.
HUB_OPTIONS = ("token", "cache_dir", "local_files_only")

# What transformers raises for files that are absent, damaged, of an unknown architecture, or in need of a package that
# is not installed.
LOADING_ERRORS = (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError)


def load_language_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    needs_head: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model in evaluation mode, with its head where that predicts the next token and was saved; and its
    tokenizer.

    Args:
        name: A Hub id, a folder, or "stories" for the story model, which ships with the package.
        revision: Branch, tag or commit of a Hub repo.
        dtype: Precision in which the model runs; "auto" is the one it was saved in.
        trust_remote_code: Run code that comes with the model.
        needs_head: Refuse a model without a head, which could write no text.
        options: What else `from_pretrained` takes, such as `device_map` or `token`.

    Raises:
        InputError: There is no such model, layers or embeddings were not saved or have other shapes than the
            configuration says, it has an encoder that cannot be loaded alone, or it lacks a head that is needed.
    """
    hub = {option: options[option] for option in HUB_OPTIONS if option in options}
    hub |= {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_language_model_config(name, **hub)
    place = _place(name)
    try:
        tokenizer = _load_tokenizer(place, name, hub)
        # Others' models are made after this one: see `process_wide.loading`.
        with loading:
            model = _load_weights(place, config, dtype=dtype, **{**options, **hub})
    except HfMsaeError:
        raise
    except LOADING_ERRORS as error:
        raise InputError(f"Cannot load the model {str(name)!r}: {error}") from error
    if needs_head and model.get_output_embeddings() is None:
        raise InputError(
            f"The model {str(name)!r} was saved without a head that predicts the next token, so it can write no text. "
            "Save or fetch it with its head."
        )
    if name == STORIES:
        model.config.name_or_path = STORIES
    return model.eval(), tokenizer


def load_language_model_config(name: str | Path, **hub: Any) -> PreTrainedConfig:
    """The configuration of a language model, named as for [`load_language_model`]; `hub` is of `from_pretrained`.

    Raises:
        InputError: There is no such model.
    """
    place = _place(name)
    if isinstance(place, str) and place.startswith((".", "/", "~")) and not Path(place).expanduser().exists():
        raise InputError(f"There is no model at {place}. Give a folder that holds a config.json, or a Hub id.")
    try:
        return AutoConfig.from_pretrained(place, **hub)
    except LOADING_ERRORS as error:
        raise InputError(f"Cannot load the model {str(name)!r}: {error}") from error


def count_parameters(name: str | Path, config: PreTrainedConfig) -> int:
    """Parameters of the model of a configuration, counted before any weight is fetched."""
    auto_class = _auto_class(name, config, trust_remote_code=False)
    with loading, torch.device("meta"):
        return int(auto_class.from_config(config, trust_remote_code=False).num_parameters())


def _place(name: str | Path) -> str | Path:
    return story_lm_path() if name == STORIES else name


def _load_tokenizer(place: str | Path, name: str | Path, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(place, **hub)
    except ValueError as error:
        first = str(error).split("\n", 1)[0]
        raise InputError(
            f"Cannot load a tokenizer of the model {str(name)!r}; it needs its tokenizer.json beside it. ({first})"
        ) from error


def _load_weights(name: str | Path, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
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
