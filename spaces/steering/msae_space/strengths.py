"""How strongly latents are steered: the numbers that the sliders stand at, and how much is too much.

Strengths are multiples of a latent's largest activation in training. How far text stays fluent depends on the length
of the shift as a share of the activations' length, so the safe band is another one for every latent. A latent whose
maximum is not known (checkpoints of other libraries do not say it) is given shifts in that share itself.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from hf_msae.steering import Gate, LatentEdit
from msae_space.loaded_sae import LoadedSAE
from msae_space.validation import choice

METHODS = {
    "add": "Add: push every token",
    "clamp": "Clamp: hold the latent at a value",
    "scale": "Scale: stronger or weaker where it fires",
    "ablate": "Ablate: switch the latent off",
}
# Shifts as shares of the activation's length: up to the first, text usually stays fluent (docs/space.md has the
# measurement); the second shows something at once; at the third the slider ends.
FLUENT_SHARE, STARTING_SHARE, LIMIT_SHARE = 0.45, 0.4, 1.0
STEP = 0.05
# Latents that are steered at once, and how strongly at most, beyond which nothing but overflow is new.
MAX_DIALS, MAX_STRENGTH = 8, 1e6
# Latents that must fire where steering acts, and where they must.
MAX_CONDITIONS = 4
PLACES = {"here": "on the tokens where it fires", "after": "on all tokens after one where it fires"}


class Dial(NamedTuple):
    """A latent and the number its slider stands at."""

    latent: int
    value: float


class Condition(NamedTuple):
    """A latent that must fire for steering to act.

    Args:
        latent: Its number.
        above: What its activation must exceed, as a share of its largest one; as it is, where that is not known.
        then: A name out of PLACES.
    """

    latent: int
    above: float = 0.0
    then: str = "here"


def has_maximum(loaded: LoadedSAE, latent: int) -> bool:
    """Whether the latent's largest activation is known, and moves anything."""
    moved = loaded.maxima[latent] * loaded.row_norms[latent]
    return 0 < moved < math.inf


def has_threshold(loaded: LoadedSAE, latent: int) -> bool:
    """Whether a share of the latent's largest activation says anything."""
    return 0 < loaded.maxima[latent] < math.inf


def strength(loaded: LoadedSAE, latent: int, share: float) -> float:
    """The strength whose shift is this share of the activations' mean length, in the latent's unit."""
    if not has_maximum(loaded, latent):
        return share
    return min(share * loaded.mean_norm / (loaded.maxima[latent] * loaded.row_norms[latent]), MAX_STRENGTH)


def fluent_up_to(loaded: LoadedSAE, latent: int) -> float:
    """The largest strength at which text usually stays fluent."""
    return strength(loaded, latent, FLUENT_SHARE)


def limit(loaded: LoadedSAE, latent: int) -> float:
    """Where the slider ends."""
    return math.ceil(2 * strength(loaded, latent, LIMIT_SHARE)) / 2


def starting_value(loaded: LoadedSAE, latent: int, share: float = STARTING_SHARE) -> float:
    """A first strength that shows something, as the slider can give it."""
    # Rounded down, so that it does not leave the band.
    return round(max(STEP, math.floor(strength(loaded, latent, share) / STEP) * STEP), 2)


def edits(
    loaded: LoadedSAE, dials: Sequence[Dial], method: str, conditions: Sequence[Condition] = ()
) -> list[LatentEdit]:
    """What the dials mean for `hf_msae.steering`, where all conditions hold."""
    choice(method, "method", METHODS)
    when = [
        Gate(latent, above, "max" if has_threshold(loaded, latent) else "absolute", then)  # type: ignore[arg-type]
        for latent, above, then in conditions
    ]
    return [
        LatentEdit(latent, value, method, "max" if has_maximum(loaded, latent) else "norm", when=when)  # type: ignore[arg-type]
        for latent, value in dials
    ]
