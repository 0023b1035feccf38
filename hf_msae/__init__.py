"""Matryoshka sparse autoencoders for any Hugging Face language model.

Importing this package registers the model with transformers, so `AutoModel.from_pretrained` loads it without remote
code.
"""

from transformers import AutoConfig, AutoModel

from hf_msae.hub import SAEEntry, list_saes, load_saes
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.process_wide import loading
from hf_msae.steering import SteeredPipeline, Steering, load_steering, save_steering, steer

__version__ = "0.1.0"

AutoConfig.register(MatryoshkaSAEConfig.model_type, MatryoshkaSAEConfig, exist_ok=True)
AutoModel.register(MatryoshkaSAEConfig, MatryoshkaSAE, exist_ok=True)
# Every checkpoint takes these files along and names them in its `auto_map`, for readers who lack hf_msae.
MatryoshkaSAEConfig.register_for_auto_class()
MatryoshkaSAE.register_for_auto_class("AutoModel")
MatryoshkaSAE.publishing_module = "hf_msae.hub.publishing"
MatryoshkaSAE.formats_module = "hf_msae.formats.conversion"
MatryoshkaSAE.loading = loading

__all__ = [
    "MatryoshkaSAE",
    "MatryoshkaSAEConfig",
    "SAEEntry",
    "SteeredPipeline",
    "Steering",
    "__version__",
    "list_saes",
    "load_saes",
    "load_steering",
    "save_steering",
    "steer",
]
