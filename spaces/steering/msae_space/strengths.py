"""How strongly latents are steered: the numbers that the sliders stand at, and how much is too much.

Strengths are multiples of a latent's largest activation in training. How far text stays fluent depends on the length
of the shift as a share of the activations' length, so the safe band is another one for every latent. A latent whose
maximum is not known (checkpoints of other libraries do not say it) is given shifts in that share itself.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from hf_msae.steering import LatentEdit
from msae_space.asked import choice
from msae_space.workbench import Workbench

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


class Dial(NamedTuple):
    """A latent and the number its slider stands at."""

    latent: int
    value: float


def has_maximum(bench: Workbench, latent: int) -> bool:
    """Whether the latent's largest activation is known, and moves anything."""
    moved = bench.maxima[latent] * bench.row_norms[latent]
    return 0 < moved < math.inf


def strength(bench: Workbench, latent: int, share: float) -> float:
    """The strength whose shift is this share of the activations' mean length, in the latent's unit."""
    if not has_maximum(bench, latent):
        return share
    return min(share * bench.mean_norm / (bench.maxima[latent] * bench.row_norms[latent]), MAX_STRENGTH)


def fluent_up_to(bench: Workbench, latent: int) -> float:
    """The largest strength at which text usually stays fluent."""
    return strength(bench, latent, FLUENT_SHARE)


def limit(bench: Workbench, latent: int) -> float:
    """Where the slider ends."""
    return math.ceil(2 * strength(bench, latent, LIMIT_SHARE)) / 2


def starting_value(bench: Workbench, latent: int, share: float = STARTING_SHARE) -> float:
    """A first strength that shows something, as the slider can give it."""
    # Rounded down, so that it does not leave the band.
    return round(max(STEP, math.floor(strength(bench, latent, share) / STEP) * STEP), 2)


def edits(bench: Workbench, dials: Sequence[Dial], method: str) -> list[LatentEdit]:
    """What the dials mean for `hf_msae.steering`."""
    choice(method, "method", METHODS)
    return [
        LatentEdit(latent, value, method, "max" if has_maximum(bench, latent) else "norm")  # type: ignore[arg-type]
        for latent, value in dials
    ]
