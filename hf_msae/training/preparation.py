"""The SAEs of a run before its first step: their names, their sites, and the weights that they begin with.

All that can be wrong with them comes out here, before long work.

A run may begin with the weights of an SAE that exists: to fine-tune it, or to give it another width. What the weights
compute is kept. Decoder rows are brought to norm 1, as the optimizer wants them, and the encoder's rows take the
factor, which changes no reconstruction. A wider SAE is cut to its first latents, which is what its prefix computes; a
narrower one gets new latents behind its own, with fresh directions and a small encoder, so that they hardly fire at
first and every level that there was stays what it was.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_msae.errors import InputError
from hf_msae.language_models import has_adapter, origin_of
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import Site, resolve_site, site_width
from hf_msae.worlds.stories import STORIES

logger = logging.getLogger(__name__)

# Encoder rows of new latents as a share of the decoder rows.
NEW_ENCODER_SCALE = 0.1
# The norm below which a decoder row has no direction.
MIN_NORM = 1e-8


def named_saes(sae: MatryoshkaSAE | Sequence[MatryoshkaSAE] | Mapping[str, MatryoshkaSAE]) -> dict[str, MatryoshkaSAE]:
    """SAEs by name; a name says site, width and k, which is what a grid varies."""
    if isinstance(sae, Mapping):
        return dict(sae)
    saes = [sae] if isinstance(sae, MatryoshkaSAE) else list(sae)
    if not saes:
        raise InputError("There is no SAE to train: give one MatryoshkaSAE, a list or a mapping of them.")
    named: dict[str, MatryoshkaSAE] = {}
    for item in saes:
        site = (item.config.site or "site").replace(":", ".").replace(os.sep, ".")
        name = f"{site}-{item.config.num_latents}-k{item.config.k:g}"
        if name in named:
            raise InputError(
                f"Two SAEs would be called {name!r}; give a mapping from names to SAEs instead of a list."
            )
        named[name] = item
    return named


def resolve_sites(model: PreTrainedModel | None, saes: Mapping[str, MatryoshkaSAE]) -> dict[str, Site]:
    """Each SAE's site, checked against the model's width there and written into its configuration."""
    sites = {}
    for name, sae in saes.items():
        if sae.config.site is None:
            raise InputError(f"The SAE {name!r} has no site. Set config.site, for example to 'layers.12'.")
        if model is None:
            sites[name] = Site.parse(sae.config.site)
            continue
        sites[name] = resolve_site(model, sae.config.site)
        width = site_width(model.eval(), sites[name])
        if width != sae.config.hidden_size:
            raise InputError(
                f"The activations at {sites[name]} have {width} dimensions, but the SAE {name!r} was made for "
                f"hidden_size={sae.config.hidden_size}. Make it with hidden_size={width}."
            )
        if sae.config.k > sae.config.prefix_sizes[0] / 2:
            logger.warning(
                "%s: k=%g is more than half of the first prefix of %d latents, which leaves that level hardly "
                "sparse; make it larger, or k smaller.",
                name,
                sae.config.k,
                sae.config.prefix_sizes[0],
            )
        sae.config.site = str(sites[name].without_wrappers())
        _record_model(sae, model)
    return sites


def _record_model(sae: MatryoshkaSAE, model: PreTrainedModel) -> None:
    """Write into an SAE's configuration which language model it reads, and which adapter on it."""
    config, origin = sae.config, origin_of(model)
    config.base_model = from_anywhere(model.config.name_or_path) or None
    if origin is not None:
        config.base_model_revision = origin.revision
        config.adapter, config.adapter_revision = from_anywhere(origin.adapter), origin.adapter_revision
    elif not has_adapter(model):
        config.adapter = config.adapter_revision = None
    elif config.adapter is None:
        logger.warning(
            "The language model has a PEFT adapter whose name is not known. Set config.adapter of the SAE to its "
            "folder or repo, or load the model with hf_msae.language_models.load_language_model, so that the SAE "
            "finds it again."
        )


def from_anywhere(name: str | None) -> str | None:
    """The name of a model or an SAE; of a folder its whole path, which also tells it from a repo on the Hub."""
    is_folder = name is not None and name not in ("", STORIES) and Path(name).is_dir()
    return os.path.abspath(name) if is_folder and name else name


class WarmStartError(InputError):
    """An SAE that cannot be the beginning of the one asked for."""


def read_initial_config(source: str) -> MatryoshkaSAEConfig:
    """The configuration of a folder or a Hub repo, of any library's format that can be read.

    Raises `WarmStartError` where there is none.
    """
    return _read(source).config


def wider_prefix_sizes(config: MatryoshkaSAEConfig, num_latents: int) -> list[int]:
    """The levels of an SAE at another width: its own up to there, and the whole."""
    return [*(size for size in config.prefix_sizes if size < num_latents), num_latents]


def warm_start(sae: MatryoshkaSAE, source: str, seed: int) -> None:
    """Give `sae` the weights and thresholds of the SAE in `source`; the directions of new latents are fixed by `seed`.

    Raises `WarmStartError` where the two do not agree on `hidden_size`, site, activation or what is subtracted before
    encoding, or where levels would be lost. Another base model is only warned about, because an SAE of a base model
    may well be fine-tuned on its chat model.
    """
    initial = _read(source)
    _check(sae.config, initial.config, source)
    if initial.config.num_latents > sae.config.num_latents:
        initial = initial.truncate(sae.config.num_latents)
    state = {name: tensor.float() for name, tensor in initial.state_dict().items()}
    with torch.no_grad():
        for name, tensor in _grown(_unit_rows(state), sae.config.num_latents, seed).items():
            getattr(sae, name).copy_(tensor)


def _read(source: str) -> MatryoshkaSAE:
    try:
        return MatryoshkaSAE.from_pretrained(
            Path(source).expanduser() if Path(source).expanduser().exists() else source
        )
    except (OSError, ValueError) as error:
        raise WarmStartError(f"Cannot begin with {source!r}: {error}") from error


def _check(config: MatryoshkaSAEConfig, initial: MatryoshkaSAEConfig, source: str) -> None:
    changed = [
        f"{name} is {getattr(initial, name)!r} there and {getattr(config, name)!r} here"
        for name in ("hidden_size", "activation", "apply_b_dec_to_input")
        if getattr(initial, name) != getattr(config, name)
    ]
    if initial.site is not None and initial.site != config.site:
        changed.append(f"its site is {initial.site}, and {config.site} is to be trained")
    kept = min(initial.num_latents, config.num_latents)
    missing = [size for size in wider_prefix_sizes(initial, kept) if size not in config.prefix_sizes]
    if missing:
        changed.append(
            f"its levels {missing} are not among prefix_sizes={config.prefix_sizes}, so their nesting would be lost"
        )
    if changed:
        raise WarmStartError(f"{source} cannot be the beginning of this SAE: {'; '.join(changed)}.")
    if initial.base_model is not None and initial.base_model != config.base_model:
        logger.warning(
            "%s was trained on %s, and goes on with activations of %s.", source, initial.base_model, config.base_model
        )


def _unit_rows(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same SAE with decoder rows of norm 1. Rows of norm 0 stay: what decodes to nothing has no direction."""
    norms = state["W_dec"].norm(dim=-1)
    norms = torch.where(norms > MIN_NORM, norms, 1.0)
    scaled = {name: state[name] * norms for name in ("b_enc", "threshold", "max_activation")}
    return state | scaled | {"W_dec": state["W_dec"] / norms[:, None], "W_enc": state["W_enc"] * norms[:, None]}


def _grown(state: dict[str, Tensor], num_latents: int, seed: int) -> dict[str, Tensor]:
    """The same SAE with new latents behind its own, and with directions for rows that have none."""
    own, hidden_size = state["W_dec"].shape
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(num_latents, hidden_size, generator=generator), dim=-1)
    aimless = state["W_dec"].norm(dim=-1) <= MIN_NORM
    state["W_dec"][aimless] = directions[:own][aimless]
    fresh = directions[own:]
    # A latent's threshold is that of its dictionary, or, where each has its own, what is usual there.
    usual = state["threshold"].median().expand(len(fresh))
    zeros = torch.zeros(len(fresh))
    new = {"W_dec": fresh, "W_enc": NEW_ENCODER_SCALE * fresh, "b_enc": zeros, "threshold": usual}
    new |= {"max_activation": zeros, "firing_rate": zeros}
    return {name: torch.cat([tensor, new[name]]) if name in new else tensor for name, tensor in state.items()}
