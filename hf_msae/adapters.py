"""PEFT adapters on language models: which model one stands on, and that model with the adapter's layers inside."""

import logging
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from hf_msae.errors import InputError
from hf_msae.model_names import Origin, options_of_files, place_of, some_of

logger = logging.getLogger(__name__)


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT has put an adapter on a model, in whatever way."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, PeftModel | BaseTunerLayer) for module in model.modules())


def read_adapter(name: str, hub: Mapping[str, Any]) -> Origin:
    """What an adapter stands on. Raises `InputError` for one that is not inside the model's layers."""
    if not is_peft_available():
        raise InputError(f"{name} is a PEFT adapter, and peft is not installed: pip install peft.")
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(place_of(name), **hub)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"The adapter_config.json of {name} cannot be read: {error!s:.200}") from error
    if not config.base_model_name_or_path:
        raise InputError(
            f"The adapter {name} does not say which model it belongs to; write base_model_name_or_path into its "
            "adapter_config.json."
        )
    if not os.path.isdir(place_of(name)) and os.path.exists(place_of(config.base_model_name_or_path)):
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


def with_adapter(model: PreTrainedModel, origin: Origin, hub: Mapping[str, Any]) -> PreTrainedModel:
    """The model with an adapter in its layers. Its head is left out where the adapter was trained for another."""
    from peft import PeftModel, TaskType
    from peft.utils import load_peft_weights

    name, options = str(origin.adapter), options_of_files(hub)
    before = {id(parameter) for parameter in model.parameters()}
    try:
        keys = load_peft_weights(place_of(name), device="cpu", **options).keys()
        place = next((one for one in (model, model.base_model) if _has_modules(one, keys)), None)
        if place is None:
            raise InputError(f"it is made for modules that a {type(model).__name__} does not have")
        # What the adapter's file lacks stays without memory, and so is found.
        found = PeftModel.from_pretrained(place, place_of(name), low_cpu_mem_usage=True, **options)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(
            f"The adapter {name} does not fit {origin.name}: {error!s:.300}. Check base_model_name_or_path in its "
            "adapter_config.json, or merge it into its model (merge_and_unload) and give the merged one."
        ) from error
    lost = {key for key, parameter in place.named_parameters() if parameter.is_meta and id(parameter) not in before}
    if lost:
        raise InputError(f"The adapter {name} lacks {some_of(lost)}; save or fetch it again, whole.")
    adapted: Any = found.get_base_model()
    if found.active_peft_config.task_type in (None, TaskType.CAUSAL_LM):
        return cast(PreTrainedModel, adapted)
    logger.warning("%s was trained for %s: no cross-entropy is measured.", name, found.active_peft_config.task_type)
    return cast(PreTrainedModel, adapted.base_model)


def _has_modules(model: nn.Module, keys: Iterable[str]) -> bool:
    """Whether an adapter's weights belong to modules that are there; those of a head that was trained may not."""
    roots = {name for name, _ in model.named_children()}
    return any(key.removeprefix("base_model.model.").partition(".")[0] in roots for key in keys)
