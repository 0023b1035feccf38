"""Compare: two SAEs, or two levels of one, on the same text; and a latent taken apart by a meta-SAE.

A meta-SAE is trained on the decoder rows of another SAE, and writes each as a sum of a few meta-latents (Leask et al.,
"Sparse Autoencoders Do Not Find Canonical Units of Analysis", arXiv:2502.04878).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import gradio as gr

from hf_msae import MatryoshkaSAE
from hf_msae.research.meta import Decomposition, decompose
from msae_space import drawing, validation
from msae_space.drawing import ON_CLICK
from msae_space.latent_index import LatentIndex
from msae_space.library import short
from msae_space.links import MAX_NAME
from msae_space.loaded_sae import Key, LoadedSAE, SpaceError
from msae_space.reading import read, read_levels
from msae_space.shared import Shared, reports_errors, text_box
from msae_space.zerogpu import on_gpu

SAME = "the open one"
FACTS = ("latents", "active per token", "FVE", "ΔCE (nats per token)", "next token changed")
NUM_LATENTS = 8
NUM_META, NUM_SHARING = 6, 5


class CompareTab(NamedTuple):
    """What the page wires up, and the handler that other events start, too."""

    text: gr.Textbox
    levels: tuple[gr.Dropdown, gr.Dropdown]
    view: gr.HTML
    compare: Callable[..., str]
    inputs: list[Any]


def build(shared: Shared, default_text: str, meta_sae: str | None) -> CompareTab:
    """The tab; call inside its `gr.Tab`."""
    text = text_box(default_text, "compare-text", "Compare")
    with gr.Row():
        left = gr.Dropdown([], label="Left: level of the open SAE", elem_id="left-level", filterable=False)
        other = gr.Dropdown(
            [(SAME, ""), *((short(name), name) for name in shared.library.own)],
            value="",
            allow_custom_value=True,
            label="Right: SAE (choose, or paste a Hub repo)",
            elem_id="other-sae",
        )
        right = gr.Dropdown([], label="Right: level", elem_id="right-level", filterable=False)
    view = gr.HTML(js_on_load=ON_CLICK, elem_id="compare-view")

    @reports_errors
    def compare(key: list[str], words: str, low: str, high: str, source: str | None) -> str:
        loaded, source = shared.loaded(key), validation.words(source, "The SAE", MAX_NAME).strip()
        words = validation.words(words, "The text")
        against = loaded if source in ("", SAME) else _other(shared, source)
        return _side_by_side(shared, (loaded, against), (_level(loaded, low), _level(against, high)), words)

    inputs = [shared.key, text, left, right, other]
    text.submit(compare, inputs, view, show_progress="hidden", api_visibility="private")
    events = [left.input, right.input, other.input]
    gr.on(events, compare, inputs, view, show_progress="hidden", api_visibility="private")
    _open_pages(shared, view)
    if meta_sae is not None:
        _build_meta(shared, meta_sae)
    return CompareTab(text, (left, right), view, compare, inputs)


def _open_pages(shared: Shared, view: gr.HTML) -> None:
    """A click on a latent opens its page."""

    @reports_errors
    def choose(key: list[str], event: gr.EventData) -> tuple[int, Any]:
        return shared.loaded(key).checked(validation.click(event._data, "latent").id), gr.Tabs(selected="explore")

    view.click(choose, shared.key, [shared.latent, shared.tabs], show_progress="hidden", api_visibility="private")


def level_choices(loaded: LoadedSAE) -> list[tuple[str, str]]:
    """The levels by their sizes."""
    return [(loaded.level_name(level), str(level)) for level in range(len(loaded.prefix_sizes))]


def _other(shared: Shared, source: str) -> LoadedSAE:
    entries = shared.library.entries(source)
    return shared.library.open(Key(source, entries[0].subfolder))


def _level(loaded: LoadedSAE, chosen: str | None) -> int:
    """The level chosen, or the last where the other SAE has fewer."""
    level = validation.decimal(validation.words(chosen, "A level", validation.MAX_WORDS))
    if level is None:
        raise SpaceError("Choose a level on both sides.")
    return min(level, len(loaded.prefix_sizes) - 1)


def _side_by_side(shared: Shared, all_loaded: tuple[LoadedSAE, LoadedSAE], levels: tuple[int, int], words: str) -> str:
    titles = [_title(loaded, level) for loaded, level in zip(all_loaded, levels, strict=True)]
    # A latent's page is one of the open SAE.
    sides = [
        _side(shared, loaded, level, words, "latent" if loaded.key == all_loaded[0].key else None)
        for loaded, level in zip(all_loaded, levels, strict=True)
    ]
    rows = [[name, left, right] for name, left, right in zip(FACTS, sides[0][0], sides[1][0], strict=True)]
    drawn = [f"<h3>{drawing.text(title)}</h3>{body}" for title, (_, body) in zip(titles, sides, strict=True)]
    note = drawing.note("Colour: how far the prediction after each token moves (KL divergence, full colour at 1 nat).")
    return drawing.table(["", *titles], rows) + note + drawing.columns(*drawn)


def _title(loaded: LoadedSAE, level: int) -> str:
    return f"{short(loaded.key.source)}, level {level}"


def _side(shared: Shared, loaded: LoadedSAE, level: int, words: str, action: str | None) -> tuple[list[str], str]:
    """One side's numbers, in the order of FACTS, and its text and strongest latents."""
    pieces, measured = read_levels(loaded, words)
    one, reading, size = measured[level], read(loaded, words), loaded.prefix_sizes[level]
    active = [[(latent, value) for latent, value in found if latent < size] for found in reading.active]
    number = sum(not skipped for skipped in reading.skipped)
    facts = [
        f"{size:,}",
        f"{sum(map(len, active)) / max(1, number):.1f}",
        f"{one.fve:.3f}",
        f"{one.ce - one.ce_clean:+.3f}",
        f"{one.num_changed} of {len(pieces)}",
    ]
    titles = [f"KL {value:.3f} nats" for value in one.kl]
    coloured = drawing.tokens(pieces, one.kl, hue=level, titles=titles, special=reading.skipped, clickable=False)
    listed = drawing.listing(_strongest(loaded, shared.index_of(loaded), active, action), "None is active.")
    return facts, coloured + drawing.section("Strongest latents in this text", listed)


def _strongest(
    loaded: LoadedSAE, index: LatentIndex, active: list[list[tuple[int, float]]], action: str | None
) -> list[str]:
    peaks: dict[int, float] = {}
    for latent, value in (pair for found in active for pair in found):
        share = value / (loaded.maxima[latent] or 1.0)
        peaks[latent] = max(peaks.get(latent, 0.0), share)
    order = sorted(peaks, key=lambda latent: -peaks[latent])[:NUM_LATENTS]
    return [
        drawing.latent_button(
            latent,
            index.name(latent),
            loaded.level_of(latent),
            extra=f"{100 * peaks[latent]:.0f}% of max",
            action=action,
        )
        for latent in order
    ]


def _build_meta(shared: Shared, source: str) -> None:
    with gr.Accordion("Take a latent apart with a meta-SAE", open=True):
        number = gr.Textbox(label="Latent", placeholder="Its number", submit_btn="Take apart", elem_id="meta-latent")
        view = gr.HTML(js_on_load=ON_CLICK, elem_id="meta-view")
        _open_pages(shared, view)

    @reports_errors
    def take_apart(key: list[str], words: str) -> str:
        loaded, index = shared.loaded(key), shared.index(key)
        return draw_parts(loaded, index, source, index.number(validation.words(words, "The number")))

    number.submit(take_apart, [shared.key, number], view, show_progress="hidden", api_visibility="private")


@lru_cache(maxsize=1)
def _meta_sae(source: str) -> MatryoshkaSAE:
    # Read by the first visitor who asks, not at start.
    return MatryoshkaSAE.from_pretrained(source).eval()


@on_gpu
def _decompose(loaded: LoadedSAE, source: str, latent: int) -> Decomposition:
    return decompose(_meta_sae(source), loaded.sae, [latent], neighbours=NUM_SHARING)[0]


def draw_parts(loaded: LoadedSAE, index: LatentIndex, source: str, latent: int) -> str:
    """The meta-latents that a latent's decoder row is made of, and other latents that share each.

    Raises:
        SpaceError: The meta-SAE is of another width.
    """
    try:
        found = _decompose(loaded, source, latent)
    except ValueError as error:
        raise SpaceError(str(error)) from error
    sections = []
    for part in found.parts[:NUM_META]:
        rows = [
            drawing.latent_button(other, index.name(other), loaded.level_of(other), extra=f"{value:.2f}")
            for other, value in part.shared_with
        ]
        listed = drawing.listing(rows, "No other latent uses it.")
        sections.append(drawing.section(f"Meta-latent {part.meta_latent}, weight {part.activation:.2f}", listed))
    words = (
        f"#{latent} ({index.name(latent)}) is written with {len(found.parts)} meta-latents; their sum has a cosine "
        f"of {found.cosine:.2f} with its direction. Under each: the other latents that use it most."
    )
    return drawing.note(words) + "".join(sections)
