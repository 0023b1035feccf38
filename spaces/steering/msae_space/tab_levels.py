"""Levels: what the reconstruction by each prefix of the dictionary keeps of a text."""

from collections.abc import Callable
from typing import Any, NamedTuple

import gradio as gr

from msae_space import drawing, validation
from msae_space.links import MAX_LEVEL
from msae_space.loaded_sae import Key, LoadedSAE
from msae_space.reading import LevelReading, are_special, read_levels
from msae_space.shared import Shared, reports_errors, text_box

EXPLANATION = (
    "The model's activations are replaced by what the first latents reconstruct, on every token but special ones and "
    "attention sinks. Colour shows how far the prediction after each token moves (KL divergence, full colour at "
    "1 nat)."
)
NUM_CHANGES = 12


class Measured(NamedTuple):
    """A text as the levels of an SAE keep it."""

    key: Key
    pieces: tuple[str, ...]
    levels: list[LevelReading]


class LevelsTab(NamedTuple):
    """What the page wires up, and the handlers that other events start, too."""

    text: gr.Textbox
    level: gr.Slider
    view: gr.HTML
    found: gr.State
    measure: Callable[..., Any]
    draw: Callable[..., str]


def build(shared: Shared, default_text: str) -> LevelsTab:
    """The tab; call inside its `gr.Tab`."""
    found = gr.State(None)
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            text = text_box(default_text, "levels-text", "Measure")
        with gr.Column(scale=6, min_width=320):
            level = gr.Slider(0, 1, 0, step=1, label="Level", elem_id="level")
    gr.HTML(drawing.note(EXPLANATION))
    view = gr.HTML(elem_id="levels-view")

    @reports_errors
    def measure(key: list[str], words: str) -> Measured:
        return Measured(Key(*key), *read_levels(shared.loaded(key), validation.words(words, "The text")))

    @reports_errors
    def draw(key: list[str], measured: Measured | None, chosen: float) -> str:
        return draw_level(shared.loaded(key), measured, validation.whole(chosen, "The level", 0, MAX_LEVEL))

    state = [shared.key, found, level]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    text.submit(measure, [shared.key, text], found, show_progress="hidden", api_visibility="private").then(
        draw, state, view, **quiet
    )
    level.change(draw, state, view, trigger_mode="always_last", **quiet)
    return LevelsTab(text, level, view, found, measure, draw)


def draw_level(loaded: LoadedSAE, measured: Measured | None, chosen: int) -> str:
    """The table of all levels, and the text at the chosen one."""
    if measured is None or measured.key != loaded.key:
        return drawing.note("Press Measure to see what each level keeps of this text.")
    pieces, levels = measured.pieces, measured.levels
    index = min(chosen, len(levels) - 1)
    held_out = (loaded.sae.config.measured or {}).get("fve", [])
    header = ["level", "latents", "FVE here", "FVE held out", "ΔCE here (nats)", "next token changed"]
    rows = [
        [
            str(number),
            f"{one.prefix:,}",
            f"{one.fve:.3f}",
            f"{held_out[number]:.3f}" if number < len(held_out) else "–",
            f"{one.ce - one.ce_clean:+.3f}",
            f"{one.num_changed} of {len(pieces)}",
        ]
        for number, one in enumerate(levels)
    ]
    level = levels[index]
    titles = [f"KL {value:.3f} nats" for value in level.kl]
    special = are_special(loaded, pieces)
    coloured = drawing.tokens(pieces, level.kl, hue=index, titles=titles, special=special, clickable=False)
    return (
        drawing.table(header, rows, chosen=index)
        + drawing.section(f"With {loaded.level_name(index)}", coloured)
        + drawing.section("Where the likeliest next token changes", _changes(pieces, special, level))
    )


def _changes(pieces: tuple[str, ...], special: list[bool], level: LevelReading) -> str:
    changed = [
        position
        for position, (now, before) in enumerate(zip(level.guesses, level.guesses_clean, strict=True))
        if now[0] != before[0]
    ]
    # The furthest moved first.
    shown = sorted(changed, key=lambda position: -level.kl[position])[:NUM_CHANGES]
    rows = [
        [
            _before(pieces, special, position),
            ", ".join(token.strip() or repr(token) for token in level.guesses_clean[position]),
            ", ".join(token.strip() or repr(token) for token in level.guesses[position]),
            f"{level.kl[position]:.2f}",
        ]
        for position in shown
    ]
    if not rows:
        return drawing.note("Nowhere: after every token, the same next token stays the likeliest.")
    return drawing.table(["after", "the model says", "at this level", "KL"], rows, of_words=True)


def _before(pieces: tuple[str, ...], special: list[bool], position: int) -> str:
    """The end of the text up to a token."""
    first = max(0, position - 3)
    words = "".join(piece for index, piece in enumerate(pieces[first : position + 1], first) if not special[index])
    return words if first == 0 else f"… {words.lstrip(' .,')}"
