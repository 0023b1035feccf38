"""Find: latents of a concept that a visitor shows by examples, and a steering by a few of them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from uuid import uuid4

import gradio as gr

from hf_msae.concepts import Finding, FoundRow
from msae_space import drawing, validation
from msae_space.dials import draw_dials, draw_under, draw_with
from msae_space.drawing import ON_CLICK
from msae_space.examples import (
    MAX_EXAMPLES,
    MAX_EXAMPLES_TEXT,
    MAX_LATENTS,
    NEGATIVE,
    POSITIVE,
    WORDS,
    Asked,
    asked,
    dials_of,
    lent_search,
)
from msae_space.generation import Runs
from msae_space.latent_index import LatentIndex
from msae_space.loaded_sae import LoadedSAE, SpaceError
from msae_space.shared import Shared, reports_errors
from msae_space.strengths import Dial

SEARCHES = Runs()
EXPLANATION = (
    "Texts that show a concept, and texts like them that do not. Half of them choose the latents, the other half say "
    "how well these tell the texts apart. Then latents are pushed, to see which make the model say it, which is "
    "another thing, and what steering needs."
)
TABLE = (
    "Tells: AUROC on held-out examples, where 0.5 is guessing. Says: probability of the words, a mean over neutral "
    "text that nothing was fitted on. All pushes are to cost the same: {loss:g} nats per token."
)
NUM_SHOWN_TOKENS = 8


class FindTab(NamedTuple):
    """What the page wires up. found: State, the sliders of the last steering found; applied: State, how often it was.

    Attributes:
        found: `[source, subfolder, [latent, value], ...]`, or None.
        applied: Changes when sliders were set and texts are to be written.
        view: What was found.
    """

    found: gr.State
    applied: gr.State
    view: gr.HTML


def build(shared: Shared) -> FindTab:
    """The tab; call inside its `gr.Tab`."""
    found, applied = gr.State(None), gr.State(0)
    gr.HTML(drawing.note(EXPLANATION))
    with gr.Row(equal_height=False, elem_classes="msae-sides"):
        boxes = [
            gr.Textbox(
                text,
                label=f"{kind}, one a line (10 to {MAX_EXAMPLES})",
                lines=7,
                max_lines=12,
                max_length=MAX_EXAMPLES_TEXT,
                elem_id=name,
            )
            for text, kind, name in ((POSITIVE, "With it", "positive"), (NEGATIVE, "Without it", "negative"))
        ]
    with gr.Row(equal_height=False, elem_id="find-row"):
        words = gr.Textbox(
            WORDS,
            label="Words to be said (empty: those typical of the examples with it)",
            max_length=validation.MAX_WORDS,
            elem_id="find-words",
            scale=3,
            min_width=240,
        )
        count = gr.Slider(1, MAX_LATENTS, 3, step=1, label="Latents in the steering, at most", scale=2, min_width=200)
        go = gr.Button("Find latents", variant="primary", elem_id="find", scale=1, min_width=120)
        stop = gr.Button("Stop", elem_id="find-stop", scale=0, min_width=80)
    view = gr.HTML(js_on_load=ON_CLICK, elem_id="found")

    @reports_errors
    def find(request: gr.Request, key: list[str], *values: Any) -> Iterator[tuple[str, Any]]:
        loaded, index = shared.loaded(key), shared.index(key)
        visitor = request.session_hash or uuid4().hex
        for drawn, dials in run(loaded, index, asked(*values), visitor):
            yield drawn, gr.skip() if dials is None else [*key, *dials]

    go.click(
        find,
        [shared.key, *boxes, words, count],
        [view, found],
        show_progress="minimal",
        show_progress_on=view,
        concurrency_limit=1,
        concurrency_id="find",
        api_visibility="private",
    )
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    stop.click(_stop, None, None, queue=False, **quiet)

    @reports_errors
    def choose(key: list[str], kept: Any, times: int, value: Any, method: str, event: gr.EventData) -> tuple[Any, ...]:
        """A click in what was found: steer with all of it, with a latent, only where one fires, or open its page."""
        loaded, index = shared.loaded(key), shared.index(key)
        clicked = validation.click(event._data, "apply", "add", "condition", "latent")
        steer, nothing = gr.Tabs(selected="steer"), gr.skip()
        if clicked.action == "apply":
            if kept is None or kept[:2] != list(key):
                raise SpaceError("What was found is of another SAE, or gone; press Find latents again.")
            dials = [Dial(*one) for one in kept[2:]]
            return draw_dials(loaded, index, dials, "add"), "add", nothing, steer, times + 1
        latent = loaded.checked(clicked.id)
        if clicked.action == "latent":
            return nothing, nothing, latent, gr.Tabs(selected="explore"), nothing
        draw = draw_with if clicked.action == "add" else draw_under
        return draw(loaded, index, value, latent, method), nothing, nothing, steer, nothing

    view.click(
        choose,
        [shared.key, found, applied, shared.dials, shared.method],
        [shared.dials, shared.method, shared.latent, shared.tabs, applied],
        **quiet,
    )
    return FindTab(found, applied, view)


def run(
    loaded: LoadedSAE, index: LatentIndex, what: Asked, visitor: str
) -> Iterator[tuple[str, Sequence[Dial] | None]]:
    """What is done, while it is; then what was found, with the sliders of its steering."""
    stopped = SEARCHES.begin(visitor)
    try:
        yield drawing.note("Beginning …"), None
        for one in lent_search(loaded, what):
            if stopped.is_set():
                yield drawing.note("Stopped."), None
                return
            if isinstance(one, Finding):
                yield draw_finding(loaded, index, one), dials_of(loaded, one)
            else:
                yield drawing.note(f"{one} …"), None
    finally:
        SEARCHES.end(visitor, stopped)


def _stop(request: gr.Request) -> None:
    SEARCHES.stop(str(request.session_hash))


def draw_finding(loaded: LoadedSAE, index: LatentIndex, finding: Finding) -> str:
    """The steering and what it does, what it is compared with, and the latents of each level."""
    words = ", ".join(token.strip() or repr(token) for token in finding.tokens[:NUM_SHOWN_TOKENS])
    facts = finding.facts
    problems = "".join(drawing.note(one, "problem") for one in finding.warnings)
    read = f"{facts['positive']} examples with it and {facts['negative']} without, half of them held out."
    return "".join(
        [
            problems,
            drawing.note(f"{read} Words to be said: {words}."),
            drawing.section("A steering", _steering(loaded, index, finding)),
            drawing.section("Beside other pushes", _compared(finding)),
            *_levels(loaded, index, finding),
        ]
    )


def _steering(loaded: LoadedSAE, index: LatentIndex, finding: Finding) -> str:
    few = next(row for row in finding.rows if row.name == "few latents")
    rows = [
        drawing.latent_button(
            dial.latent, _name(index, dial.latent), loaded.level_of(dial.latent), extra=f"{dial.value:+.2f}"
        )
        for dial in dials_of(loaded, finding)
    ]
    said = f"Their probability goes from {_percent(finding.at_rest)} to {_percent(few.effect.said)}."
    label = "Steer with it" if len(rows) == 1 else f"Steer with these {len(rows)}"
    button = drawing.button(label, "apply", 0, primary=True)
    return f"{drawing.listing(rows, '')}{drawing.note(said)}{button}"


def _compared(finding: Finding) -> str:
    header = ["", "tells", "says", "loss"]
    rows = [[_called(row), *_numbers(row)] for row in finding.rows]
    rows.append(["nothing", "–", _percent(finding.at_rest), "0.00"])
    return drawing.table(header, rows) + drawing.note(TABLE.format(loss=finding.loss))


def _levels(loaded: LoadedSAE, index: LatentIndex, finding: Finding) -> Iterator[str]:
    """The latents that each level adds, of those that were tried, those that say it most first."""
    for level, told in enumerate(finding.levels):
        rows = [_row(index, row, level) for row in finding.latents if row.level == level]
        best = (
            f"Of these and all before, #{told.latent} tells best (AUROC {told.auroc:.2f}); {len(told.few)} together "
            f"reach {told.few_auroc:.2f}."
        )
        listed = drawing.listing(rows, "None of its own was worth a push.")
        yield drawing.section(loaded.level_name(level).capitalize(), listed + drawing.note(best))


def _row(index: LatentIndex, row: FoundRow, level: int) -> str:
    (latent,) = row.latents
    told, said, _ = _numbers(row)
    extra = f"tells {told} · says {said}"
    button = drawing.latent_button(latent, _name(index, latent), level, extra=extra, action="add", with_level=False)
    beside = drawing.button("only where", "condition", latent, title="Steering acts only where this latent fires")
    return f'<div class="msae-pair">{button}{beside}</div>'


def _name(index: LatentIndex, latent: int) -> str:
    return index.promoted(latent) or index.name(latent)


def _called(row: FoundRow) -> str:
    return f"{row.name} (#{row.latents[0]})" if row.name.startswith("the latent") else row.name


def _numbers(row: FoundRow) -> list[str]:
    told = "–" if row.auroc is None else f"{row.auroc:.2f}"
    return [told, _percent(row.effect.said), f"{row.effect.loss:.2f}"]


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"
