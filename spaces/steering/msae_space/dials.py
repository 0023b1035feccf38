"""The sliders of the latents that are steered.

They go from −limit to limit, in multiples of the latent's largest activation in training, and mark the band in which
text usually stays fluent. The list is one HTML component whose value is
`{"html": ..., "dials": [{"latent": 12, "value": 1.5}, ...]}`. Its script keeps `dials` up to date while sliders move;
what comes back from a browser is checked before it is used.
"""

from collections.abc import Sequence
from typing import Any

from msae_space.drawing import note, text
from msae_space.latent_index import LatentIndex
from msae_space.loaded_sae import LoadedSAE, SpaceError
from msae_space.strengths import (
    MAX_DIALS,
    MAX_STRENGTH,
    STEP,
    Dial,
    fluent_up_to,
    has_maximum,
    limit,
    starting_value,
)
from msae_space.validation import MAX_NUMBER, UNREADABLE, number, whole

MAX_FACTOR = 4.0
EFFECT = "The words whose logits it raises most by itself, later layers left out"

TEMPLATE = "${value.html}"
SCRIPT = """
const inputs = () => [...element.querySelectorAll('input[type=range]')];
const words = (input) => {
  const number = Number(input.value);
  const sign = number > 0 && input.dataset.signed ? '+' : number < 0 ? '−' : '';
  const shown = sign + Math.abs(number).toFixed(2) + input.dataset.unit;
  input.closest('.msae-dial').querySelector('output').textContent = shown;
  input.setAttribute('aria-valuetext', shown);
  input.closest('.msae-dial').classList.toggle('msae-far', Math.abs(number) > Number(input.dataset.fluent));
};
const read = () => inputs().map((input) => ({latent: Number(input.dataset.id), value: Number(input.value)}));
const show = () => inputs().forEach((input, i) => {
  const dial = props.value.dials[i];
  if (dial && dial.latent === Number(input.dataset.id)) input.value = dial.value;
  words(input);
});
element.addEventListener('input', (event) => words(event.target));
element.addEventListener('change', () => {
  props.value = {html: props.value.html, dials: read()};
  trigger('release', {});
});
element.addEventListener('click', (event) => {
  const chosen = event.target.closest('[data-do]');
  if (chosen) trigger('click', {action: chosen.dataset.do, id: Number(chosen.dataset.id)});
});
watch('value', show);
show();
"""


def read_dials(value: Any, loaded: LoadedSAE) -> list[Dial]:
    """The dials of a component's value.

    Raises:
        SpaceError: The value is none that this page sends.
    """
    sent = (value if isinstance(value, dict) else {"dials": None}).get("dials", [])
    if not isinstance(sent, list) or not all(isinstance(one, dict) for one in sent):
        raise SpaceError(UNREADABLE)
    if len(sent) > MAX_DIALS:
        raise SpaceError(f"Up to {MAX_DIALS} latents are steered at once; more rarely help.")
    return [
        Dial(
            loaded.checked(whole(one.get("latent"), "A latent", -MAX_NUMBER, MAX_NUMBER)),
            number(one.get("value"), "A strength", -MAX_STRENGTH, MAX_STRENGTH),
        )
        for one in sent
    ]


def added(dials: Sequence[Dial], dial: Dial) -> list[Dial]:
    """The dials with one more, or with another value of one.

    Raises:
        SpaceError: As many latents as may be are steered already.
    """
    others = [one for one in dials if one.latent != dial.latent]
    if len(others) >= MAX_DIALS:
        raise SpaceError(f"Up to {MAX_DIALS} latents are steered at once; remove one first.")
    if len(others) < len(dials):
        return [dial if one.latent == dial.latent else one for one in dials]
    return [*dials, dial]


def draw_with(
    loaded: LoadedSAE, index: LatentIndex, dials: Sequence[Dial], latent: int, method: str
) -> dict[str, Any]:
    """The component's value with one latent more, at a strength that shows something.

    Raises:
        SpaceError: As many latents as may be are steered already.
    """
    dial = Dial(latent, starting_value(loaded, latent))
    return draw_dials(loaded, index, added(dials, dial), method)


def draw_dials(loaded: LoadedSAE, index: LatentIndex, dials: Sequence[Dial], method: str) -> dict[str, Any]:
    """The component's value."""
    rows = "".join(_draw(loaded, index, dial, method) for dial in dials)
    empty = note("No latent is steered yet. Take one of the above, or search for a word.")
    return {"html": rows or empty, "dials": [dial._asdict() for dial in dials]}


def _draw(loaded: LoadedSAE, index: LatentIndex, dial: Dial, method: str) -> str:
    name, level = index.name(dial.latent), loaded.level_of(dial.latent)
    scaled = method == "scale"
    end = MAX_FACTOR if scaled else limit(loaded, dial.latent)
    fluent = end if scaled else min(end, fluent_up_to(loaded, dial.latent))
    low = 0.0 if scaled else -end
    unit = "× as active" if scaled else "× max" if has_maximum(loaded, dial.latent) else "× norm"
    share = fluent / end
    left, width = (0.0, 1.0) if scaled else (0.5 - share / 2, share)
    ends = ("0", "×2", f"×{end:g}") if scaled else (f"−{end:g}", "0", f"+{end:g}")
    slider = (
        f'<div class="msae-track"><span class="msae-band" style="--from:{left:.4f};--share:{width:.4f}"></span>'
        f'<input type="range" min="{low:g}" max="{end:g}" step="{STEP}" value="{dial.value:g}" '
        f'data-id="{dial.latent}" data-unit="{unit}" data-fluent="{fluent:.4f}" {"" if scaled else "data-signed=1"} '
        f'aria-label="Strength of latent {dial.latent}, {text(name)}"></div>'
        f'<div class="msae-ends">{"".join(f"<span>{end}</span>" for end in ends)}</div>'
    )
    hidden = ' class="msae-off"' if method == "ablate" else ""
    pushes = _draw_effect(index, dial.latent)
    return (
        f'<div class="msae-dial msae-hue-{level % 6}"><div class="msae-dial-head">'
        f'<button type="button" class="msae-link" data-do="latent" data-id="{dial.latent}" '
        f'title="Open this latent\'s page"><span class="msae-level">level {level}</span>'
        f'<span class="msae-number">#{dial.latent}</span><span class="msae-name">{text(name)}</span></button>'
        "<output></output>"
        f'<button type="button" class="msae-remove" data-do="remove" data-id="{dial.latent}" '
        f'aria-label="Remove latent {dial.latent}">✕</button></div>{pushes}<div{hidden}>{slider}</div></div>'
    )


def _draw_effect(index: LatentIndex, latent: int) -> str:
    """What turning the latent up does: as tried out, or else as its direction has it."""
    preset, promoted = index.tried(latent), index.promoted(latent)
    if preset is not None:
        return f'<p class="msae-pushes" title="{text(preset.why)}">leads to {text(preset.name)}</p>'
    return f'<p class="msae-pushes" title="{EFFECT}">directly promotes {text(promoted)}</p>' if promoted else ""
