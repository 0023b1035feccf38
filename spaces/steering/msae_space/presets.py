"""What a visitor tries first: one click sets sliders and a prompt, and writes.

Where steerings are published beside the SAE (`steering.json`), they are the presets. For the story model, whose text
is here, latents are tried out (`msae_space.trials`). Otherwise the latents that promote words most directly are taken,
for a latent that fires on a word rarely makes a model say it (Arad et al., arXiv:2505.20063).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_msae.interpret.store import Interpretation
from hf_msae.steering import Gate, LatentEdit, Steering, SteeringError, load_steerings
from msae_space.loaded_sae import LoadedSAE
from msae_space.strengths import (
    MAX_CONDITIONS,
    MAX_DIALS,
    MAX_STRENGTH,
    METHODS,
    Condition,
    Dial,
    has_threshold,
    starting_value,
)

NUM_PRESETS, PRESETS_PER_LEVEL = 8, 3
# A latent that fires more or less often than this is no handle to try first.
MIN_DENSITY, MAX_DENSITY = 0.0005, 0.2
NUM_WORDS, MIN_LETTERS = 3, 3


@dataclass(frozen=True)
class Preset:
    """Dials, and perhaps a prompt, that one click sets.

    Args:
        name: On its button.
        dials: The latents and their strengths.
        method: What is done with them.
        prompt: What is written on; None leaves the visitor's.
        seed: Of the sampling; None leaves the visitor's.
        why: What speaks for it, shown on hovering.
        conditions: The latents that must fire where it acts.
    """

    name: str
    dials: tuple[Dial, ...]
    method: str = "add"
    prompt: str | None = None
    seed: int | None = None
    why: str = ""
    conditions: tuple[Condition, ...] = ()


def published(loaded: LoadedSAE) -> list[Preset]:
    """The steerings beside the SAE, as far as sliders can show them.

    They are of this SAE, with one method for all latents, and all of them behind the same gates.
    """
    try:
        steerings = load_steerings(loaded.key.source, subfolder=loaded.key.subfolder)
    except SteeringError:
        return []
    return [preset for steering in steerings.values() if (preset := _from_steering(loaded, steering)) is not None]


def _from_steering(loaded: LoadedSAE, steering: Steering) -> Preset | None:
    edits = [edit for edit in steering.edits if isinstance(edit, LatentEdit) and edit.units in ("max", "absolute")]
    methods = {edit.method for edit in edits}
    if len(edits) != len(steering.edits) or len(methods) != 1 or not methods <= METHODS.keys():
        return None
    if any(edit.sae or not 0 <= edit.latent < loaded.sae.config.num_latents for edit in edits):
        return None
    gates = edits[0].gates
    if any(edit.gates != gates for edit in edits) or len(gates) > MAX_CONDITIONS:
        return None
    if any(gate.latent >= loaded.sae.config.num_latents for gate in gates):
        return None
    dials = tuple(Dial(edit.latent, _in_maxima(loaded, edit)) for edit in edits)
    conditions = tuple(Condition(gate.latent, _threshold(loaded, gate), gate.then) for gate in gates)
    numbers = [*(dial.value for dial in dials), *(one.above for one in conditions)]
    if len(dials) > MAX_DIALS or not all(abs(one) <= MAX_STRENGTH for one in numbers):
        return None
    return Preset(steering.name, dials, methods.pop(), why=steering.description, conditions=conditions)


def _threshold(loaded: LoadedSAE, gate: Gate) -> float:
    """What a gate's latent must exceed, as a `Condition` has it."""
    if gate.units == "max" or not has_threshold(loaded, gate.latent):
        return gate.above
    return gate.above / loaded.maxima[gate.latent]


def _in_maxima(loaded: LoadedSAE, edit: LatentEdit) -> float:
    maximum = loaded.maxima[edit.latent]
    if edit.units == "max" or edit.method not in ("add", "clamp") or maximum <= 0:
        return edit.value
    return edit.value / maximum


def by_promotion(loaded: LoadedSAE, found: Interpretation) -> list[Preset]:
    """The latents with the strongest direct effects on words, no two on the same word, of several levels."""
    chosen: list[Preset] = []
    seen: set[str] = set()
    levels: list[int] = []
    for latent, words in promoting(loaded, found):
        level = loaded.level_of(latent)
        if len(words) < NUM_WORDS or seen & set(words) or levels.count(level) >= PRESETS_PER_LEVEL:
            continue
        dial = Dial(latent, starting_value(loaded, latent))
        chosen.append(Preset(", ".join(words), (dial,), why="Promotes these words most; not tried out."))
        seen |= set(words)
        levels.append(level)
        if len(chosen) == NUM_PRESETS:
            break
    return chosen


def promoting(loaded: LoadedSAE, found: Interpretation) -> list[tuple[int, list[str]]]:
    """Latents that fire neither rarely nor everywhere, those with the largest effects on the logits first.

    The effects are those at a latent's maximum. Each comes with the words among its most promoted tokens.
    """
    densities, promoted = found.column("density"), found.column("promoted")
    maxima = loaded.maxima
    effects = {
        latent: tokens[0]["effect"] * maxima[latent]
        for latent, tokens in enumerate(promoted)
        if tokens and MIN_DENSITY <= densities[latent] <= MAX_DENSITY
    }
    order = sorted(effects, key=lambda latent: -effects[latent])
    return [(latent, words_of(promoted[latent])) for latent in order]


def is_word(token: str) -> bool:
    """Whether a token says more than signs and stumps of words do."""
    return token.strip().isalpha() and len(token.strip()) >= MIN_LETTERS


def words_of(promoted: Sequence[Mapping[str, Any]]) -> list[str]:
    """The words among a latent's most promoted tokens."""
    tokens = [one["token"] for one in promoted[: 2 * NUM_WORDS]]
    return list(dict.fromkeys(token.strip() for token in tokens if is_word(token)))[:NUM_WORDS]
