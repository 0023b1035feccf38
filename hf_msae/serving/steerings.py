"""Reads the two fields that OpenAI's requests do not have: `steering` and `return_latents`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_msae.errors import HfMsaeError
from hf_msae.serving.limits import Limits, RequestError
from hf_msae.serving.models import Served
from hf_msae.steering import LatentEdit, PrefixEdit, Steering
from hf_msae.steering.edits import Edit, check_edits

FORMS = (
    'the name of a saved one; {"latents": {"12": 2.0, "40": "ablate"}}, with method, units, positions and sae as '
    'options; {"level": 1}; or {"edits": [...]} as steering.json has it'
)
OPTIONS = {
    "latents": ("latents", "method", "units", "sae", "positions"),
    "level": ("level", "keep_error", "sae", "positions"),
    "edits": ("edits", "positions", "name", "description"),
}
MAX_INDEX = 2**31
DEFAULT_TOP = 10


@dataclass(frozen=True)
class LatentsWanted:
    """Which active latents are given back.

    Args:
        sae: Of which SAE, by the name that edits use.
        top: How many on a token, the strongest.
        prompt: Whether those of the prompt's tokens are given, too.
    """

    sae: str
    top: int = DEFAULT_TOP
    prompt: bool = False


def read_steering(value: Any, served: Served, limits: Limits) -> Steering:
    """The steering that a request asks for.

    Raises:
        RequestError: There is no such steering, or the SAEs cannot do it.
    """
    if isinstance(value, str):
        if value not in served.steerings:
            there = ", ".join(map(repr, served.steerings)) or "none"
            raise RequestError(f"{served.name!r} has no saved steering {value!r:.80}; there are {there}.", "steering")
        return served.steerings[value]
    form = next((name for name in OPTIONS if isinstance(value, dict) and name in value), None)
    if form is None:
        raise RequestError(f"a steering is {FORMS}; got {value!r:.80}.", "steering")
    unknown = sorted(set(value) - set(OPTIONS[form]))
    if unknown:
        raise RequestError(
            f"a steering by {form} has {', '.join(OPTIONS[form])}, and no {unknown[0]!r:.80}.", "steering"
        )
    _check_positions(value.get("positions"))
    try:
        if form == "edits":
            steering = Steering.from_dict(value)
        else:
            edits = _of_latents(value, limits) if form == "latents" else [_prefix_edit(value)]
            written = {"positions": value.get("positions", "all")}
            steering = Steering(edits, Steering.from_dict(written).positions)
        _check(steering, served, limits)
    except RequestError:
        raise
    except (HfMsaeError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise RequestError(f"the steering cannot be done: {error!s:.400}", "steering") from None
    return steering


def _of_latents(value: Mapping[str, Any], limits: Limits) -> list[Edit]:
    latents = value["latents"]
    if not isinstance(latents, dict) or not latents:
        raise RequestError(f'latents are an object such as {{"12": 2.0}}, got {latents!r:.80}.', "steering")
    if len(latents) > limits.max_edits:
        raise RequestError(f"{len(latents)} latents, where {limits.max_edits} are the most.", "steering")
    options = {name: value[name] for name in ("units", "sae") if name in value}
    edits: list[Edit] = []
    for index, amount in latents.items():
        if not (index.isascii() and index.isdecimal() and len(index) < 10):
            raise RequestError(f"a latent is a whole number from 0, got {index!r:.80}.", "steering")
        if amount == "ablate":
            edits.append(LatentEdit(int(index), method="ablate", **options))
        else:
            edits.append(LatentEdit(int(index), amount, value.get("method", "add"), **options))
    return edits


def _prefix_edit(value: Mapping[str, Any]) -> PrefixEdit:
    return PrefixEdit(**{name: value[name] for name in ("level", "keep_error", "sae") if name in value})


def _check_positions(positions: Any) -> None:
    """Raises RequestError for numbers that no text has so many tokens for, which torch cannot take."""
    numbers = positions.values() if isinstance(positions, dict) else []
    if any(isinstance(number, int) and abs(number) >= MAX_INDEX for number in numbers):
        raise RequestError(f"positions are counted in tokens, got {positions!r:.80}.", "steering")


def _check(steering: Steering, served: Served, limits: Limits) -> None:
    """Raises RequestError or SteeringError where the SAEs cannot do it."""
    if len(steering.edits) > limits.max_edits:
        raise RequestError(f"{len(steering.edits)} edits, where {limits.max_edits} are the most.", "steering")
    saes = served.pipe.saes
    unknown = sorted({edit.sae for edit in steering.edits} - saes.keys())
    if unknown:
        there = ", ".join(map(repr, saes))
        raise RequestError(f"{served.name!r} has no SAE {unknown[0]!r:.80}; there are {there}.", "steering")
    for name, sae in saes.items():
        check_edits(sae, [edit for edit in steering.edits if edit.sae == name], name)


def read_wanted(value: Any, served: Served) -> LatentsWanted | None:
    """Which latents a request asks back: true, or an object with top, prompt and sae.

    Raises:
        RequestError: It is neither, or there is no such SAE.
    """
    if value is None or value is False:
        return None
    value = {} if value is True else value
    if not isinstance(value, dict) or set(value) - {"top", "prompt", "sae"}:
        raise RequestError(
            f"return_latents is true, or an object with top, prompt and sae; got {value!r:.80}.", "return_latents"
        )
    saes = served.pipe.saes
    sae = value.get("sae", next(iter(saes)) if len(saes) == 1 else None)
    if not isinstance(sae, str) or sae not in saes:
        raise RequestError(
            f"return_latents needs the name of an SAE as sae, out of {', '.join(map(repr, saes))}; got {sae!r:.80}.",
            "return_latents",
        )
    top, prompt = value.get("top", DEFAULT_TOP), value.get("prompt", False)
    if isinstance(top, bool) or not isinstance(top, int) or top < 1 or not isinstance(prompt, bool):
        raise RequestError(
            f"return_latents takes a whole number from 1 as top, and true or false as prompt; got {value!r:.80}.",
            "return_latents",
        )
    return LatentsWanted(sae, top, prompt)
