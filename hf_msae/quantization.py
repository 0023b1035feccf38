"""Language models whose linear layers bitsandbytes quantizes as they are loaded."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAEConfig

logger = logging.getLogger(__name__)
# To how many bits bitsandbytes takes a model's linear layers as it is loaded.
QUANTIZATIONS = ("4bit", "8bit")


def quantizing_options(
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
