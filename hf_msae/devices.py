"""Where things run: on the machine's accelerator or on the CPU; and where language models and SAEs are put.

One rule: the language model decides, and SAEs go to where it reads tokens. A command puts the model on the process's
device, a trainer on the run's (as `transformers.Trainer` does); what was split over devices stays as it is.

Activations are counted in float64, which Apple's GPUs do not have. So these are not used: the CPU is, and it is said.
"""

import logging
from functools import lru_cache
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

WITHOUT_FLOAT64 = frozenset({"mps"})

Module = TypeVar("Module", bound=nn.Module)


def stays_on_cpu(use_cpu: bool = False) -> bool:
    """Whether the CPU is used: because that is asked for, or because there is no accelerator that would do.

    `accelerate` must be told, or it sees one process where torchrun made several.

    Args:
        use_cpu: Whether it is asked for.
    """
    if use_cpu or not torch.accelerator.is_available():
        return True
    kind = torch.accelerator.current_accelerator()
    if kind is None or kind.type not in WITHOUT_FLOAT64:
        return kind is None
    _say_that_it_is_not_used(kind.type)
    return True


@lru_cache
def _say_that_it_is_not_used(kind: str) -> None:
    logger.warning(
        "This machine's accelerator (%s) has no float64, in which activations are counted; the CPU is used.", kind
    )


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a language model reads tokens, which is where its SAEs go.

    Of weights that accelerate has offloaded none lies anywhere; its hooks then take tokens from the CPU.
    """
    weight = next(model.get_input_embeddings().parameters())
    return torch.device("cpu") if weight.is_meta else weight.device


def move_language_model(model: PreTrainedModel, device: torch.device) -> None:
    """Put a language model on a device; one that is split over several, or was quantized to where it is, stays.

    Args:
        model: The model, which is changed.
        device: Where it is to be.
    """
    places = {tensor.device for tensor in model.parameters()}
    split = len(places) > 1 or torch.device("meta") in places or (model.tp_size or 1) > 1
    quantized = model.config.to_dict().get("quantization_config") is not None
    if places != {device} and not split and not quantized:
        model.to(device)  # type: ignore[arg-type]  # transformers hides the signature
