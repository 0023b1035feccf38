"""What of a steering can leave this library: a vector that is added to every token alike.

Other programs know nothing of latents, and all they can do is add a constant vector at one place of the model: as a
bias of its weights (`exporting_models`), or as a file that they read (`exporting_vectors`). Here the vector is made,
and whatever else a steering may do is refused, because it depends on the activation or on the place in the text.

One difference stays, and whoever exports is told of it: `steer` leaves special tokens and outliers alone, and a
constant shift acts on them as well.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_msae.errors import OutputExistsError
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.sites import Site, recorded_output_site, resolve_site
from hf_msae.steering.edits import Edit, LatentDelta, LatentEdit, PrefixEdit, check_edits, check_sae_names
from hf_msae.steering.gates import SteeringError
from hf_msae.steering.saved import Steering

CAN_LEAVE = "Only edits that add, in units 'max' or 'absolute' and on all positions, are such a vector."


def check_constant(steering: Steering) -> None:
    """Make sure that a steering adds the same vector to every token, before any model is loaded.

    Raises:
        SteeringError: An edit depends on the activation or on the place in the text, or there is nothing to add.
    """
    called = f"the steering {steering.name!r}"
    if not isinstance(steering.positions, str) or steering.positions != "all":
        raise SteeringError(
            f"{called} acts on positions={steering.positions!r} only, and an exported vector on every token. "
            f"{CAN_LEAVE}"
        )
    for edit in steering.edits:
        why = _why_not_constant(edit)
        if why is not None:
            raise SteeringError(f"{called} cannot be exported as a constant vector: {why}. {CAN_LEAVE}")
    if all(edit.changes_nothing for edit in steering.edits if isinstance(edit, LatentEdit)):
        raise SteeringError(f"{called} changes nothing, so there is nothing to export.")


def _why_not_constant(edit: Edit) -> str | None:
    if isinstance(edit, PrefixEdit):
        return f"what keeping level {edit.level} takes away depends on which latents are active"
    if edit.changes_nothing:
        return None
    if edit.method != "add":
        return f"what method={edit.method!r} of latent {edit.latent} adds depends on the latent's own activation"
    if edit.units == "norm":
        return f"units='norm' of latent {edit.latent} make the shift as long as each token's activation"
    if edit.gates:
        return f"a gate lets the edit of latent {edit.latent} act on some tokens only"
    return None


def constant_shifts(
    model: PreTrainedModel, saes: MatryoshkaSAE | Mapping[str, MatryoshkaSAE], steering: Steering
) -> dict[Site, Tensor]:
    """The vector that a steering adds to every token at each site, (hidden_size,) in the SAE's precision, on the CPU.

    Args:
        model: The language model; without its weights will do (`language_models.outline_of`).
        saes: The SAE, or several by the names that the edits use.
        steering: What is done.

    Raises:
        SteeringError: As `check_constant`, or for edits that the SAE does not have.
        SiteError: The model does not have the SAE's site.
    """
    check_constant(steering)
    saes = saes if isinstance(saes, Mapping) else {"": saes}
    check_sae_names(steering.edits, saes)
    shifts: dict[Site, Tensor] = {}
    for name, sae in saes.items():
        edits = [edit for edit in steering.edits if edit.sae == name and isinstance(edit, LatentEdit)]
        if not edits:
            continue
        check_edits(sae, edits, name)
        site = resolve_site(model, recorded_output_site(sae.config, called=name, error=SteeringError))
        delta = LatentDelta(sae, edits)
        shift = (delta.constants @ delta.rows).cpu()
        shifts[site] = shifts[site] + shift if site in shifts else shift
    return shifts


def layer_before(model: PreTrainedModel, site: Site) -> int | None:
    """The layer whose output the residual stream at a site is; None where the site is another place.

    The input of layer 5 is the output of layer 4; that of layer 0 is no layer's.
    """
    first = resolve_site(model, "layers.0").path
    found = re.fullmatch(re.escape(first.removesuffix("0")) + r"(\d+)", site.path)
    if found is None:
        return None
    layer = int(found[1]) - (site.io == "input")
    return None if layer < 0 else layer


def check_free(path: str | Path) -> None:
    """Raises OutputExistsError where something is at a path already, apart from an empty folder."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputExistsError(f"{path} exists; name another output, or remove it first.")


def check_finite(shifts: Mapping[Site, Tensor]) -> None:
    """Raises SteeringError for a vector that a file could hold, but no model could use."""
    for site, shift in shifts.items():
        if not torch.isfinite(shift).all():
            raise SteeringError(f"the shift at {site} is not finite; give smaller values.")
