"""The sliders of the latents that are steered.

They go from −limit to limit, in multiples of the latent's largest activation in training, and mark the band in which
text usually stays fluent. Under them stand the latents that must fire for steering to act. The list is one HTML
component, whose value is

  {"html": ..., "dials": [{"latent": 12, "value": 1.5}], "conditions": [{"latent": 40, "above": 0.5, "then": "here"}]}

Its script keeps both up to date while sliders move; what comes back from a browser is checked before it is used.
"""

from collections.abc import Sequence
from typing import Any

from msae_space.drawing import note, text
from msae_space.latent_index import LatentIndex
from msae_space.loaded_sae import LoadedSAE, SpaceError
from msae_space.strengths import (
    MAX_CONDITIONS,
    MAX_DIALS,
    MAX_STRENGTH,
    PLACES,
    STEP,
    Condition,
    Dial,
    fluent_up_to,
    has_maximum,
    has_threshold,
    limit,
    starting_value,
)
from msae_space.validation import MAX_NUMBER, UNREADABLE, choice, number, whole

MAX_FACTOR = 4.0
EFFECT = "The words whose logits it raises most by itself, later layers left out"

TEMPLATE = "${value.html}"
SCRIPT = """
const inputs = () => [...element.querySelectorAll('.msae-dial input[type=range]')];
const conditions = () => [...element.querySelectorAll('.msae-condition')];
const sayCondition = (one) => {
  const input = one.querySelector('input');
  const number = input ? Number(input.value) : Number(one.dataset.above);
  const unit = input ? '× max' : '';
  const shown = number > 0 ? 'above ' + number.toFixed(2) + unit : 'where active';
  one.querySelector('output').textContent = shown;
  if (input) input.setAttribute('aria-valuetext', shown);
};
const words = (input) => {
  if (input.closest('.msae-condition')) return sayCondition(input.closest('.msae-condition'));
  const number = Number(input.value);
  const sign = number > 0 && input.dataset.signed ? '+' : number < 0 ? '−' : '';
  const shown = sign + Math.abs(number).toFixed(2) + input.dataset.unit;
  input.closest('.msae-dial').querySelector('output').textContent = shown;
  input.setAttribute('aria-valuetext', shown);
  input.closest('.msae-dial').classList.toggle('msae-far', Math.abs(number) > Number(input.dataset.fluent));
};
const read = () => inputs().map((input) => ({latent: Number(input.dataset.id), value: Number(input.value)}));
const readConditions = () => conditions().map((one) => ({
  latent: Number(one.dataset.id),
  above: Number(one.querySelector('input')?.value ?? one.dataset.above),
  then: one.querySelector('select').value,
}));
const show = () => {
  inputs().forEach((input, i) => {
    const dial = props.value.dials[i];
    if (dial && dial.latent === Number(input.dataset.id)) input.value = dial.value;
    words(input);
  });
  conditions().forEach((one, i) => {
    const kept = (props.value.conditions ?? [])[i];
    if (kept && kept.latent === Number(one.dataset.id)) {
      if (one.querySelector('input')) one.querySelector('input').value = kept.above;
      one.querySelector('select').value = kept.then;
    }
    sayCondition(one);
  });
};
element.addEventListener('input', (event) => event.target.type === 'range' && words(event.target));
element.addEventListener('change', () => {
  props.value = {html: props.value.html, dials: read(), conditions: readConditions()};
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
    sent = _listed(value, "dials")
    if len(sent) > MAX_DIALS:
        raise SpaceError(f"Up to {MAX_DIALS} latents are steered at once; more rarely help.")
    return [
        Dial(
            loaded.checked(whole(one.get("latent"), "A latent", -MAX_NUMBER, MAX_NUMBER)),
            number(one.get("value"), "A strength", -MAX_STRENGTH, MAX_STRENGTH),
        )
        for one in sent
    ]


def read_conditions(value: Any, loaded: LoadedSAE) -> list[Condition]:
    """The conditions of a component's value.

    Raises:
        SpaceError: The value is none that this page sends.
    """
    sent = _listed(value, "conditions")
    if len(sent) > MAX_CONDITIONS:
        raise SpaceError(f"Up to {MAX_CONDITIONS} conditions hold at once; more rarely leave a token.")
    return [
        Condition(
            loaded.checked(whole(one.get("latent"), "A latent", -MAX_NUMBER, MAX_NUMBER)),
            number(one.get("above"), "A threshold", 0, MAX_STRENGTH),
            choice(one.get("then"), "place", PLACES),
        )
        for one in sent
    ]


def _listed(value: Any, name: str) -> list[dict[str, Any]]:
    sent = (value if isinstance(value, dict) else {name: None}).get(name, [])
    if not isinstance(sent, list) or not all(isinstance(one, dict) for one in sent):
        raise SpaceError(UNREADABLE)
    return sent


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


def draw_with(loaded: LoadedSAE, index: LatentIndex, value: Any, latent: int, method: str) -> dict[str, Any]:
    """A component's value with one latent more, at a strength that shows something.

    Raises:
        SpaceError: As many latents as may be are steered already, or the value is none that this page sends.
    """
    dials = added(read_dials(value, loaded), Dial(latent, starting_value(loaded, latent)))
    return draw_dials(loaded, index, dials, method, read_conditions(value, loaded))


def draw_under(loaded: LoadedSAE, index: LatentIndex, value: Any, latent: int, method: str) -> dict[str, Any]:
    """A component's value with one condition more: that a latent is active at all.

    Raises:
        SpaceError: There are as many as may be, or the value is none that this page sends.
    """
    kept = [one for one in read_conditions(value, loaded) if one.latent != latent]
    if len(kept) >= MAX_CONDITIONS:
        raise SpaceError(f"Up to {MAX_CONDITIONS} conditions hold at once; remove one first.")
    return draw_dials(loaded, index, read_dials(value, loaded), method, [*kept, Condition(latent)])


def draw_dials(
    loaded: LoadedSAE,
    index: LatentIndex,
    dials: Sequence[Dial],
    method: str,
    conditions: Sequence[Condition] = (),
) -> dict[str, Any]:
    """The component's value."""
    rows = "".join(_draw(loaded, index, dial, method) for dial in dials)
    rows = rows or note("No latent is steered yet. Take one of the above, or search for a word.")
    if conditions:
        title = "Only where this fires" if len(conditions) == 1 else "Only where all of these fire"
        rows += f'<h3 class="msae-under">{title}</h3>'
        rows += "".join(_draw_condition(loaded, index, one) for one in conditions)
    kept = [one._asdict() for one in conditions]
    return {"html": rows, "dials": [dial._asdict() for dial in dials], "conditions": kept}


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
        f"{_draw_link(level, dial.latent, text(name))}<output></output>"
        f'<button type="button" class="msae-remove" data-do="remove" data-id="{dial.latent}" '
        f'aria-label="Remove latent {dial.latent}">✕</button></div>{pushes}<div{hidden}>{slider}</div></div>'
    )


def _draw_condition(loaded: LoadedSAE, index: LatentIndex, condition: Condition) -> str:
    """A latent that must fire, how strongly and where. Without a known maximum, it is enough that it is active."""
    latent, above, then = condition
    level, name = loaded.level_of(latent), text(index.name(latent))
    slider = (
        f'<div class="msae-track"><input type="range" min="0" max="{max(1.0, above):g}" step="{STEP}" '
        f'value="{above:g}" data-id="{latent}" aria-label="Threshold of latent {latent}, {name}"></div>'
    )
    choices = "".join(
        f'<option value="{place}"{" selected" if place == then else ""}>{words}</option>'
        for place, words in PLACES.items()
    )
    return (
        f'<div class="msae-condition msae-hue-{level % 6}" data-id="{latent}" data-above="{above:g}">'
        f'<div class="msae-dial-head">{_draw_link(level, latent, name)}<output></output>'
        f'<button type="button" class="msae-remove" data-do="free" data-id="{latent}" '
        f'aria-label="Remove the condition on latent {latent}">✕</button></div>'
        f"{slider if has_threshold(loaded, latent) else ''}"
        f'<select aria-label="Where latent {latent} lets steering act">{choices}</select></div>'
    )


def _draw_link(level: int, latent: int, name: str) -> str:
    """A latent that opens its page; its name is escaped already."""
    return (
        f'<button type="button" class="msae-link" data-do="latent" data-id="{latent}" '
        f'title="Open this latent\'s page"><span class="msae-level">level {level}</span>'
        f'<span class="msae-number">#{latent}</span><span class="msae-name">{name}</span></button>'
    )


def _draw_effect(index: LatentIndex, latent: int) -> str:
    """What turning the latent up does: as tried out, or else as its direction has it."""
    preset, promoted = index.tried(latent), index.promoted(latent)
    if preset is not None:
        return f'<p class="msae-pushes" title="{text(preset.why)}">leads to {text(preset.name)}</p>'
    return f'<p class="msae-pushes" title="{EFFECT}">directly promotes {text(promoted)}</p>' if promoted else ""
