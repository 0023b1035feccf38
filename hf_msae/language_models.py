"""Which class of transformers loads a language model, and what its checkpoint must have held.

transformers fills whatever a checkpoint lacks with random numbers. A random head would still give a cross-entropy, so
a model without the weights of its head is loaded without a head; random layers would be trained on, so they are
refused.
"""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)

from hf_msae.errors import InputError

logger = logging.getLogger(__name__)

# What transformers raises for files that are absent, damaged, of an unknown architecture, or in need of a package that
# is not installed.
LOADING_ERRORS = (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError)


def load_weights(name: str | Path, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The model of a checkpoint: with its head where that predicts the next token and was saved, else without.

    options: as `from_pretrained` takes them.
    Raises ValueError where layers or embeddings were not saved or have other shapes than the configuration says, and
    for an encoder–decoder whose encoder cannot be loaded alone.
    """
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
