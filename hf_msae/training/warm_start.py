"""Beginning a run with the weights of an SAE that exists: to fine-tune it, or to give it another width.

What the weights compute is kept. Decoder rows are brought to norm 1, as the optimizer wants them, and the encoder's
rows take the factor, which changes no reconstruction. A wider SAE is cut to its first latents, which is what its
prefix computes; a narrower one gets new latents behind its own, with fresh directions and a small encoder, so that
they hardly fire at first and every level that there was stays what it was.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor

from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig

logger = logging.getLogger(__name__)

# Encoder rows of new latents as a share of the decoder rows.
NEW_ENCODER_SCALE = 0.1
# The norm below which a decoder row has no direction.
MIN_NORM = 1e-8


class WarmStartError(InputError):
    """An SAE that cannot be the beginning of the one asked for."""


def read_initial_config(source: str) -> MatryoshkaSAEConfig:
    """Read the configuration of the SAE that a run is to begin with.

    Args:
        source: A folder or a Hub repo, of any library's format that can be read.

    Returns:
        Its configuration.

    Raises:
        WarmStartError: Where there is none.
    """
    return _read(source).config


def wider_prefix_sizes(config: MatryoshkaSAEConfig, num_latents: int) -> list[int]:
    """The levels of an SAE at another width: its own up to there, and the whole."""
    return [*(size for size in config.prefix_sizes if size < num_latents), num_latents]


def warm_start(sae: MatryoshkaSAE, source: str, seed: int) -> None:
    """Give an SAE the weights and thresholds of one that exists.

    Another base model is only warned about, because an SAE of a base model may well be fine-tuned on its chat model.

    Args:
        sae: The SAE, which is changed.
        source: A folder or a Hub repo.
        seed: Fixes the directions of new latents.

    Raises:
        WarmStartError: Where the two do not agree on `hidden_size`, site, activation or what is subtracted before
            encoding, or where levels would be lost.
    """
    initial = _read(source)
    _check(sae.config, initial.config, source)
    if initial.config.num_latents > sae.config.num_latents:
        initial = initial.truncate(sae.config.num_latents)
    state = {name: tensor.float() for name, tensor in initial.state_dict().items()}
    with torch.no_grad():
        grown = _grown(_unit_rows(state), sae.config.num_latents, seed, sae.config.is_transcoder)
        for name, tensor in grown.items():
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
        for name in ("hidden_size", "hidden_size_out", "skip", "lookup_size", "activation", "apply_b_dec_to_input")
        if getattr(initial, name) != getattr(config, name)
    ]
    if initial.site is not None and initial.site != config.site:
        changed.append(f"its site is {initial.site}, and {config.site} is to be trained")
    if initial.site_out is not None and initial.site_out != config.site_out:
        changed.append(f"its site_out is {initial.site_out}, and {config.site_out} is to be reconstructed")
    if config.aligned and not initial.aligned:
        changed.append("aligned is True here, and its encoder rows are not aligned, so what it computes would be lost")
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


def _grown(state: dict[str, Tensor], num_latents: int, seed: int, reads_elsewhere: bool) -> dict[str, Tensor]:
    """The same SAE with new latents behind its own, and with directions for rows that have none."""
    own, hidden_size = state["W_dec"].shape
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(num_latents, hidden_size, generator=generator), dim=-1)
    aimless = state["W_dec"].norm(dim=-1) <= MIN_NORM
    state["W_dec"][aimless] = directions[:own][aimless]
    fresh = directions[own:]
    # A latent's threshold is that of its dictionary, or, where each has its own, what is usual there.
    typical = state["threshold"].median().expand(len(fresh))
    zeros = torch.zeros(len(fresh))
    new = {"W_dec": fresh, "W_enc": NEW_ENCODER_SCALE * fresh, "b_enc": zeros, "threshold": typical}
    if reads_elsewhere:
        # Rows that read another place than they write point elsewhere, and are as long as the others there.
        inputs = torch.randn(num_latents, state["W_enc"].shape[1], generator=generator)[own:]
        lengths = state["W_enc"].norm(dim=-1).median()
        new["W_enc"] = NEW_ENCODER_SCALE * lengths * torch.nn.functional.normalize(inputs, dim=-1)
    new |= {"max_activation": zeros, "firing_rate": zeros}
    return {name: torch.cat([tensor, new[name]]) if name in new else tensor for name, tensor in state.items()}
