"""The model and nothing else: configuration, model and the sparse operations under it.

These files import only torch and transformers, because a copy of them lies beside every saved checkpoint and must load
where hf_msae is not installed. Import them as `hf_msae.modeling`.
"""

from .configuration_matryoshka_sae import MatryoshkaSAEConfig
from .modeling_matryoshka_sae import MatryoshkaSAE, MatryoshkaSAEOutput, MatryoshkaSAEPreTrainedModel

__all__ = ["MatryoshkaSAE", "MatryoshkaSAEConfig", "MatryoshkaSAEOutput", "MatryoshkaSAEPreTrainedModel"]
