"""Steer: choose latents, set their strengths, and read default and steered text beside each other."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from uuid import uuid4

import gradio as gr

from hf_msae.steering import Steering
from msae_space import drawing, validation
from msae_space.dials import SCRIPT, TEMPLATE, draw_dials, draw_under, draw_with, read_conditions, read_dials
from msae_space.drawing import ON_CLICK
from msae_space.generation import Runs, Texts, lent_stream
from msae_space.latent_index import Hit, LatentIndex
from msae_space.links import MAX_NEW_TOKENS, MAX_SEED, MAX_TEMPERATURE, POSITIONS, View, as_python
from msae_space.loaded_sae import Key, LoadedSAE, SpaceError
from msae_space.reading import check_prompt
from msae_space.shared import Shared, reports_errors
from msae_space.strengths import METHODS, Dial, edits
from msae_space.zerogpu import find_zerogpu

RUNS = Runs()
EXPLANATION = (
    "Strengths are multiples of each latent's largest activation in training. Inside the green band text usually "
    "stays fluent. What a latent does is a hypothesis until tried, and a good prompt often steers better."
)
CONDITION = "Steering acts only where this latent fires"
# On a phone the texts are below what starts them; they are brought into view when they begin.
SHOW_TEXTS = """
let writing = false;
watch('value', () => {
  const now = element.querySelector('.msae-caret') !== null;
  if (now && !writing && element.getBoundingClientRect().top > innerHeight - 60)
    element.scrollIntoView({behavior: 'smooth', block: 'start'});
  writing = now;
});
"""


class Controls(NamedTuple):
    """The components whose values a run needs, in the order of the handlers' arguments."""

    prompt: gr.Textbox
    dials: gr.HTML
    method: gr.Dropdown
    positions: gr.Dropdown
    temperature: gr.Slider
    length: gr.Slider
    seed: gr.Number


class Writing(NamedTuple):
    """What an event does that starts a run: handler, inputs and outputs, and how it is queued."""

    parts: tuple[Any, Any, Any]
    options: dict[str, Any]


class SteerTab(NamedTuple):
    """What the page wires up."""

    controls: Controls
    presets: gr.HTML
    results: gr.HTML
    writing: Writing


def build_dials() -> tuple[gr.HTML, gr.Dropdown]:
    """The components that other tabs write to, made before the tabs are."""
    nothing = {"html": "", "dials": [], "conditions": []}
    dials = gr.HTML(nothing, html_template=TEMPLATE, js_on_load=SCRIPT, elem_id="dials", render=False)
    choices = [(words, name) for name, words in METHODS.items()]
    method = gr.Dropdown(choices, value="add", label="What is done", elem_id="method", render=False, filterable=False)
    return dials, method


def build(shared: Shared, default_prompt: str) -> SteerTab:
    """The tab; call inside its `gr.Tab`."""
    presets = gr.HTML(js_on_load=ON_CLICK, elem_id="presets")
    with gr.Row(equal_height=False, elem_classes="msae-sides"):
        with gr.Column(scale=5, min_width=320):
            shared.dials.render()
            query = gr.Textbox(
                label="Find latents",
                placeholder="A word, a phrase, or a number such as 341",
                elem_id="search",
                max_length=validation.MAX_WORDS,
                submit_btn="Search",
            )
            results = gr.HTML(js_on_load=ON_CLICK, elem_id="results")
            shared.method.render()
        with gr.Column(scale=7, min_width=320):
            prompt = gr.Textbox(
                default_prompt, label="Prompt", lines=2, max_lines=6, max_length=validation.MAX_TEXT, elem_id="prompt"
            )
            with gr.Row(elem_id="go-row"):
                go = gr.Button("Generate", variant="primary", elem_id="generate", scale=3, min_width=120)
                stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
            texts = gr.HTML(_panes("", Texts()), js_on_load=SHOW_TEXTS, elem_id="texts")
            gr.HTML(drawing.note(EXPLANATION))
            with gr.Accordion("More settings", open=False):
                choices = [(words, name) for name, words in POSITIONS.items()]
                positions = gr.Dropdown(choices, value="all", label="Where it acts", filterable=False)
                temperature = gr.Slider(
                    0, MAX_TEMPERATURE, 0.7, step=0.05, label="Temperature (0 takes the likeliest token)"
                )
                length = gr.Slider(1, MAX_NEW_TOKENS, 60, step=1, label="New tokens")
                seed = gr.Number(0, label="Seed (both texts share it)", precision=0, minimum=0, maximum=MAX_SEED)
            with gr.Accordion("Copy as Python", open=False):
                code = gr.Code(language="python", interactive=False, label="Python", elem_id="code")
    controls = Controls(prompt, shared.dials, shared.method, positions, temperature, length, seed)
    inputs, outputs = [shared.key, *controls], [texts, code]

    @reports_errors
    def generate(request: gr.Request, key: list[str], *values: Any) -> Iterator[tuple[str, str]]:
        loaded, view = shared.loaded(key), view_of(shared, key, *values)
        program = as_python(loaded, view)
        # A program that calls the page's API may have no session; its runs are nobody else's, either.
        for drawn in run(loaded, view, request.session_hash or uuid4().hex):
            yield drawn, program

    running: dict[str, Any] = {
        "show_progress": "hidden",
        "concurrency_limit": 4,
        "concurrency_id": "generate",
        "api_visibility": "private",
        "trigger_mode": "multiple",  # a new run ends the visitor's old one, see `run`
    }
    gr.on([go.click, prompt.submit, shared.dials.release], generate, inputs, outputs, **running)
    stop.click(_stop, None, None, queue=False, show_progress="hidden", api_visibility="private")

    @reports_errors
    def search(key: list[str], words: str) -> str:
        return _hits(shared, key, words)

    gr.on([query.submit], search, [shared.key, query], results, show_progress="hidden", api_visibility="private")

    @reports_errors
    def choose(key: list[str], value: Any, method: str, event: gr.EventData) -> tuple[Any, Any, Any]:
        """A click in the lists or on a dial: add the latent or a condition, remove it, or open its page."""
        loaded, index = shared.loaded(key), shared.index(key)
        clicked = validation.click(event._data, "latent", "remove", "add", "condition", "free")
        latent = loaded.checked(clicked.id)
        if clicked.action == "latent":
            return gr.skip(), latent, gr.Tabs(selected="explore")
        if clicked.action in ("add", "condition"):
            draw = draw_with if clicked.action == "add" else draw_under
            return draw(loaded, index, value, latent, method), gr.skip(), gr.skip()
        dials, conditions = read_dials(value, loaded), read_conditions(value, loaded)
        if clicked.action == "remove":
            dials = [dial for dial in dials if dial.latent != latent]
        else:
            conditions = [one for one in conditions if one.latent != latent]
        return draw_dials(loaded, index, dials, method, conditions), gr.skip(), gr.skip()

    for component in (results, shared.dials):
        component.click(
            choose,
            [shared.key, shared.dials, shared.method],
            [shared.dials, shared.latent, shared.tabs],
            show_progress="hidden",
            api_visibility="private",
        )

    @reports_errors
    def take(key: list[str], event: gr.EventData) -> tuple[Any, str, Any, Any]:
        """A click on a preset: its sliders take the place of all others."""
        loaded, index = shared.loaded(key), shared.index(key)
        presets, chosen = index.presets(), validation.click(event._data, "take").id
        if not 0 <= chosen < len(presets):
            raise SpaceError("That preset is not there any more; reload the page.")
        preset = presets[chosen]
        drawn = draw_dials(loaded, index, preset.dials, preset.method, preset.conditions)
        words, random = (gr.skip() if one is None else one for one in (preset.prompt, preset.seed))
        return drawn, preset.method, words, random

    presets.click(
        take,
        [shared.key],
        [shared.dials, shared.method, prompt, seed],
        show_progress="hidden",
        api_visibility="private",
    ).success(generate, inputs, outputs, **running)

    @reports_errors
    def redraw(key: list[str], value: Any, method: str) -> Any:
        loaded, method = shared.loaded(key), validation.choice(method, "method", METHODS)
        dials = [Dial(latent, _fitting(value, method)) for latent, value in read_dials(value, loaded)]
        return draw_dials(loaded, shared.index(key), dials, method, read_conditions(value, loaded))

    shared.method.input(
        redraw,
        [shared.key, shared.dials, shared.method],
        shared.dials,
        show_progress="hidden",
        api_visibility="private",
    )
    return SteerTab(controls, presets, results, Writing((generate, inputs, outputs), running))


def _fitting(value: float, method: str) -> float:
    """A strength as it is kept when the method changes; a factor below 0 is none."""
    return max(0.0, value) if method == "scale" else value


def view_of(shared: Shared, key: list[str], *values: Any) -> View:
    """The settings of a run. Raises SpaceError for values that the page's components do not give."""
    prompt, dials, method, positions, temperature, length, seed = values
    loaded = shared.loaded(key)
    return View(
        Key(*key),
        prompt=validation.words(prompt, "The prompt"),
        dials=tuple(read_dials(dials, loaded)),
        conditions=tuple(read_conditions(dials, loaded)),
        method=validation.choice(method, "method", METHODS),
        positions=validation.choice(positions, "place", POSITIONS),
        temperature=validation.number(temperature, "The temperature", 0, MAX_TEMPERATURE),
        max_new_tokens=validation.whole(length, "The number of new tokens", 1, MAX_NEW_TOKENS),
        seed=validation.whole(seed or 0, "The seed", 0, MAX_SEED),
    )


def run(loaded: LoadedSAE, view: View, visitor: str) -> Iterator[str]:
    """The two panes while the texts grow."""
    prompt, texts = view.prompt or " ", Texts()
    check_prompt(loaded, prompt, view.max_new_tokens)
    stopped = RUNS.begin(visitor)
    try:
        steering = Steering(edits(loaded, view.dials, view.method, view.conditions), positions=view.positions)
        # An event cannot go to the process that ZeroGPU forks; there, whoever stops reading has stopped.
        event = stopped if find_zerogpu() is None else None
        for texts in lent_stream(
            loaded,
            prompt,
            steering,
            seed=view.seed,
            temperature=view.temperature,
            max_new_tokens=view.max_new_tokens,
            stopped=event,
        ):
            # What an old run still has to say must not appear among the words of the new one.
            if RUNS.is_superseded(visitor, stopped):
                return
            if event is None and stopped.is_set():
                texts = replace(texts, done=True)
            yield _panes(prompt, texts)
            if texts.done:
                return
    finally:
        RUNS.end(visitor, stopped)


def _stop(request: gr.Request) -> None:
    RUNS.stop(str(request.session_hash))


def _panes(prompt: str, texts: Texts) -> str:
    def pane(name: str, words: str) -> str:
        if not prompt:
            body = drawing.note("Take a preset, or press Generate.")
        else:
            caret = "" if texts.done else '<span class="msae-caret"></span>'
            before = f'<span class="msae-prompt">{drawing.text(prompt)}</span>'
            body = f'<p class="msae-text">{before}{drawing.text(words)}{caret}</p>'
        measured = f'<p class="msae-measure">{_measure(words, texts, name)}</p>'
        return f'<div id="{name}-text"><h3>{name.capitalize()}</h3>{body}{measured}</div>'

    state = "done" if texts.done else "waiting"
    busy = "true" if prompt and not texts.done else "false"
    return (
        f'<div class="msae-columns msae-panes" aria-live="polite" aria-busy="{busy}" data-state="{state}">'
        f"{pane('default', texts.default)}{pane('steered', texts.steered)}</div>"
    )


def _measure(words: str, texts: Texts, name: str) -> str:
    if not texts.done:
        return ""
    loss = texts.losses.get(name)
    if loss is not None and not math.isfinite(loss):
        return "So strong that the model's numbers overflow; turn it down."
    if loss is None:
        return "" if words else "The text ended at once."
    return f"Loss {loss:.2f} nats per token to the unsteered model"


def _hits(shared: Shared, key: list[str], words: str) -> str:
    loaded, index = shared.loaded(key), shared.index(key)
    hits = index.search(validation.words(words, "The search", validation.MAX_WORDS))
    if not hits:
        return drawing.note("No latent was found. Try another word, a phrase, or the number of a latent.")
    titles = {
        True: "Promote it (nats at their maximum): these steer",
        False: "Fire on it (% of their maximum): these read",
    }
    if len(hits) == 1:
        titles[False] = "Click to steer with it, or only where it fires"
    parts = []
    for promotes, title in titles.items():
        rows = [_row(loaded, index, hit) for hit in hits if hit.promotes == promotes]
        if rows:
            parts.append(f"<h4>{title}</h4>{drawing.listing(rows, '')}")
    return "".join(parts)


def _row(loaded: LoadedSAE, index: LatentIndex, hit: Hit) -> str:
    """A latent to steer with; one that reads can be a condition, too."""
    name = (hit.promotes and index.promoted(hit.latent)) or index.name(hit.latent)
    row = drawing.latent_button(hit.latent, name, loaded.level_of(hit.latent), extra=hit.why, action="add")
    if hit.promotes:
        return row
    return (
        f'<div class="msae-pair">{row}{drawing.button("only where", "condition", hit.latent, title=CONDITION)}</div>'
    )


def draw_presets(shared: Shared, key: list[str]) -> str:
    """What to begin with, as a row of buttons."""
    index = shared.index(key)
    loaded = shared.loaded(key)
    buttons = "".join(
        f'<button type="button" class="msae-preset msae-hue-{loaded.level_of(preset.dials[0].latent) % 6}" '
        f'data-do="take" data-id="{number}" title="{drawing.text(preset.why)}">{drawing.text(preset.name)}</button>'
        for number, preset in enumerate(index.presets())
    )
    label = '<span class="msae-label">Try steering towards</span>' if buttons else ""
    words = drawing.note(index.progress) if index.progress else ""
    return f'<div class="msae-presets">{label}{buttons}</div>{words}'
