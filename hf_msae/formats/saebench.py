"""SAEBench: the object that its evaluations take (arXiv:2503.09532; what they read of it is as of version 0.6).

SAEBench knows an SAE by its methods and by matrices of the orientation of SAELens, and writes into its configuration
whatever it found out. So it gets an object of its own, around a copy of the model: latents and reconstruction are the
model's, and what SAEBench moves or writes leaves the model as it was.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_msae.errors import InputError
from hf_msae.formats.saelens_names import hook_of_site, model_in_lens
from hf_msae.modeling import MatryoshkaSAE


@dataclass
class SAEBenchConfig:
    """What SAEBench reads of an SAE, in TransformerLens' words. It may be changed, and SAEBench adds attributes."""

    model_name: str
    hook_name: str
    hook_layer: int
    d_in: int
    d_sae: int
    architecture: str
    dtype: str
    device: str
    apply_b_dec_to_input: bool
    prepend_bos: bool
    context_size: int | None = None
    hook_head_index: int | None = None
    normalize_activations: str = "none"
    seqpos_slice: tuple[int | None, ...] = (None,)
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_trust_remote_code: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields above, as JSON takes them; what SAEBench added is left out."""
        return asdict(self)


class SAEBenchSAE(nn.Module):
    """A `MatryoshkaSAE` in evaluation mode, as SAEBench wants it. `to_saebench` makes one.

    `W_enc` is (hidden_size, num_latents) and `W_dec` (num_latents, hidden_size); both are views of the weights.
    """

    def __init__(self, sae: MatryoshkaSAE, cfg: SAEBenchConfig):
        super().__init__()
        self.sae = sae.eval().requires_grad_(False)
        self.cfg = cfg

    @property
    def W_enc(self) -> Tensor:
        """Encoder, (hidden_size, num_latents)."""
        return self.sae.W_enc.T

    @property
    def W_dec(self) -> Tensor:
        """Decoder, (num_latents, hidden_size)."""
        return self.sae.W_dec

    @property
    def b_enc(self) -> Tensor:
        """Encoder bias, (num_latents,)."""
        return self.sae.b_enc

    @property
    def b_dec(self) -> Tensor:
        """Decoder bias, (hidden_size,)."""
        return self.sae.b_dec

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.sae.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.sae.W_dec.dtype

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations (..., num_latents) of activations (..., hidden_size)."""
        return self.sae.encode(x)

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruction (..., hidden_size) of latent activations (..., num_latents)."""
        return self.sae.decode(latents.to(self.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction (..., hidden_size) of activations (..., hidden_size)."""
        return self.decode(self.encode(x))

    def to(self, *args: Any, **kwargs: Any) -> "SAEBenchSAE":
        """As in torch; thresholds stay float32, because rounded ones would select other latents."""
        threshold = self.sae.threshold.data
        super().to(*args, **kwargs)
        self.sae.threshold.data = threshold.to(self.device)
        self.cfg.device, self.cfg.dtype = str(self.device), _name(self.dtype)
        return self


def to_saebench(sae: MatryoshkaSAE, prefix: int | None = None) -> SAEBenchSAE:
    """An object that SAEBench's evaluations take, of the first `prefix` latents (all by default).

    SAEBench expects decoder rows of unit norm, as training here leaves them, and warns of others.
    Raises `ValueError` where the language model or the place in it, which SAEBench needs, has no name in
    TransformerLens, and for a prefix that the model has not.
    """
    config = sae.config
    model_name = hook_name = None
    if config.base_model is not None and config.site is not None:
        model_name = model_in_lens(config.base_model)
        hook_name = hook_of_site(config.site, config.base_model) if model_name else None
    if hook_name is None or hook_name == "hook_embed" or "attn.hook_z" in hook_name:
        raise InputError(
            f"SAEBench runs language models in TransformerLens, and {config.site} of {config.base_model} is no place "
            "that it hooks there. Set sae.config.base_model to the Hub id of a model that TransformerLens has, and "
            "sae.config.site to a place in its residual stream ('layers.12'), or the output of .mlp or .attn."
        )
    inner = sae.truncate(config.num_latents if prefix is None else prefix)
    cfg = SAEBenchConfig(
        model_name=str(model_name),
        hook_name=hook_name,
        hook_layer=int(hook_name.split(".")[1]),
        d_in=config.hidden_size,
        d_sae=inner.config.num_latents,
        architecture=f"matryoshka_{config.activation}" if inner.config.num_levels > 1 else config.activation,
        dtype=_name(inner.W_dec.dtype),
        device=str(inner.W_dec.device),
        apply_b_dec_to_input=config.apply_b_dec_to_input,
        prepend_bos=config.prepend_bos,
        context_size=config.context_length,
        model_from_pretrained_kwargs={"revision": config.base_model_revision} if config.base_model_revision else {},
    )
    return SAEBenchSAE(inner, cfg)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
