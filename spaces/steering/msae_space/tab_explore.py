"""Explore: a text's tokens and their latents, and the page of one latent."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import gradio as gr

from hf_msae.interpret.function_words import is_function_word
from hf_msae.interpret.pages import LatentPage, TokenEffect
from msae_space import drawing, validation
from msae_space.dials import draw_under, draw_with
from msae_space.drawing import ON_CLICK
from msae_space.latent_index import Hit, LatentIndex, strengths
from msae_space.loaded_sae import LoadedSAE
from msae_space.reading import Reading, are_special, read
from msae_space.shared import Shared, reports_errors, text_box

ONE_LATENT, ALL_LEVELS = "one", "levels"
FIRST_COLOURS = [
    ("the latent nearest to its maximum, in the colour of its level", ALL_LEVELS),
    ("the latent whose page is open", ONE_LATENT),
]
NUM_SHOWN, NUM_CONTEXTS = 8, 8
# As rare as a latent may count: one that never fired in training would tell everything.
RAREST = 1e-4


class ExploreTab(NamedTuple):
    """What the page wires up, and the handlers that other events start, too."""

    text: gr.Textbox
    colour: gr.Dropdown
    tokens: gr.HTML
    details: gr.HTML
    page: gr.HTML
    reading: gr.State
    token: gr.State
    read: Callable[..., Any]
    tell: Callable[..., Any]
    draw: Callable[..., Any]
    state: list[Any]


def build(shared: Shared, default_text: str) -> ExploreTab:
    """The tab; call inside its `gr.Tab`."""
    reading, token = gr.State(None), gr.State(None)
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            text = text_box(default_text, "explore-text", "Read")
            colour = gr.Dropdown(
                FIRST_COLOURS,
                value=ALL_LEVELS,
                label="Colour tokens by",
                elem_id="colour",
                filterable=False,
            )
            tokens = gr.HTML(js_on_load=ON_CLICK, elem_id="tokens")
            details = gr.HTML(js_on_load=ON_CLICK, elem_id="token-latents")
        with gr.Column(scale=6, min_width=320):
            number = gr.Textbox(
                label="Latent", placeholder="Its number", elem_id="latent-number", max_length=12, submit_btn="Open"
            )
            page = gr.HTML(js_on_load=ON_CLICK, elem_id="latent-page")
    shown = [tokens, details]
    state = [shared.key, reading, token, shared.latent, colour]

    @reports_errors
    def draw(key: list[str], found: Reading | None, position: int | None, latent: int | None, by: str) -> Any:
        return draw_reading(shared.loaded(key), shared.index(key), found, position, latent, by)

    @reports_errors
    def read_text(key: list[str], words: str) -> tuple[Reading, None]:
        return read(shared.loaded(key), validation.words(words, "The text")), None

    @reports_errors
    def tell(key: list[str], found: Reading | None, latent: int | None) -> Any:
        """Open a page where none is open yet."""
        return (
            gr.skip()
            if found is None or latent is not None
            else most_telling(shared.loaded(key), shared.index(key), found)
        )

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    done = text.submit(read_text, [shared.key, text], [reading, token], **quiet).then(draw, state, shown, **quiet)
    done.success(tell, [shared.key, reading, shared.latent], shared.latent, **quiet)
    colour.input(draw, state, shown, **quiet)

    @reports_errors
    def choose(key: list[str], value: Any, method: str, latent: int | None, event: gr.EventData) -> tuple[Any, ...]:
        """A click on a token, a latent or a button of a latent's page."""
        clicked = validation.click(event._data, "token", "latent", "steer", "condition")
        if clicked.action == "token":
            return clicked.id, latent, gr.skip(), gr.skip(), gr.skip()
        loaded, index = shared.loaded(key), shared.index(key)
        chosen = loaded.checked(clicked.id)
        if clicked.action in ("steer", "condition"):
            draw_more = draw_with if clicked.action == "steer" else draw_under
            dials = draw_more(loaded, index, value, chosen, method)
            return gr.skip(), latent, dials, gr.Tabs(selected="steer"), gr.skip()
        return gr.skip(), chosen, gr.skip(), gr.skip(), ONE_LATENT

    for component in (tokens, details, page):
        component.click(
            choose,
            [shared.key, shared.dials, shared.method, shared.latent],
            [token, shared.latent, shared.dials, shared.tabs, colour],
            **quiet,
        ).then(draw, state, shown, **quiet)

    @reports_errors
    def open_number(key: list[str], words: str) -> tuple[int, str]:
        return shared.index(key).number(validation.words(words, "The number")), ONE_LATENT

    number.submit(open_number, [shared.key, number], [shared.latent, colour], **quiet)

    @reports_errors
    def open_page(key: list[str], latent: int | None) -> str:
        return draw_page(shared.loaded(key), shared.index(key), latent)

    shared.latent.change(
        open_page, [shared.key, shared.latent], page, show_progress="hidden", api_visibility="private"
    )
    shared.latent.change(draw, state, shown, **quiet)
    return ExploreTab(text, colour, tokens, details, page, reading, token, read_text, tell, draw, state)


def colour_choices(loaded: LoadedSAE) -> list[tuple[str, str]]:
    """By each token's strongest latent, by the open latent, or by the latents that a level adds."""
    sizes = [0, *loaded.prefix_sizes]
    levels = [
        (f"level {level} · latents {low:,} to {high - 1:,}", str(level))
        for level, (low, high) in enumerate(pairwise(sizes))
    ]
    return [*FIRST_COLOURS, *levels]


def most_telling(loaded: LoadedSAE, index: LatentIndex, found: Reading) -> int | None:
    """The latent that is near its largest activation on some token, and rarely active at all.

    One that is named by a word which says what a text is about comes before all others.
    """

    def tells(latent: int, value: float) -> tuple[bool, float]:
        is_concept = not all(map(is_function_word, index.name(latent).split(", ")))
        return is_concept, -loaded.share_of_maximum(latent, value) * math.log(max(loaded.firing_rates[latent], RAREST))

    pairs = [pair for active in found.active for pair in active]
    return max(pairs, key=lambda pair: tells(*pair))[0] if pairs else None


def draw_reading(
    loaded: LoadedSAE, index: LatentIndex, found: Reading | None, position: int | None, latent: int | None, by: str
) -> tuple[str, str]:
    """The coloured tokens, and the latents of the token that was clicked."""
    if found is None or found.key != loaded.key:
        return "", drawing.note("Press Read to see the text as the SAE reads it.")
    latent = loaded.here(latent)
    strengths, hues, titles = _strengths(loaded, index, found, latent, by)
    tokens = drawing.tokens(found.pieces, strengths, hue=hues, marked=position, titles=titles, special=found.skipped)
    if position is None or not 0 <= position < len(found.pieces):
        return tokens, drawing.note("Click a token to list its latents.")
    return tokens, _token_latents(loaded, index, found, position)


def _strengths(
    loaded: LoadedSAE, index: LatentIndex, found: Reading, latent: int | None, by: str
) -> tuple[Sequence[float], int | Sequence[int], Sequence[str]]:
    """Per token a colour in 0 … 1 and a title, and the hue, one or of each token."""
    if by == ALL_LEVELS:
        return _by_strongest(loaded, index, found)
    if by == ONE_LATENT:
        values = [0.0] * len(found.pieces) if latent is None else found.values(latent)
        hue = 0 if latent is None else loaded.level_of(latent)
        maximum = 0.0 if latent is None else loaded.maxima[latent]
        scale = maximum or max(values) or 1.0
        return [value / scale for value in values], hue, [f"{value:.2f}" for value in values]
    level = int(validation.choice(by, "colour", [str(level) for level in range(len(loaded.prefix_sizes))]))
    sums = [sum(value for one, value in active if loaded.level_of(one) == level) for active in found.active]
    whole = [sum(value for _, value in active) or 1.0 for active in found.active]
    shares = [part / total for part, total in zip(sums, whole, strict=True)]
    return shares, level, [f"{100 * share:.0f}% of the activation is of this level" for share in shares]


def _by_strongest(
    loaded: LoadedSAE, index: LatentIndex, found: Reading
) -> tuple[Sequence[float], Sequence[int], Sequence[str]]:
    """Per token the latent that is nearest to its largest activation: how near, its level, and its name."""
    shares, levels, titles = [], [], []
    for active in found.active:
        near = [(loaded.share_of_maximum(latent, value), latent, value) for latent, value in active]
        share, latent, value = max(near, default=(0.0, 0, 0.0))
        level = loaded.level_of(latent)
        shares.append(share)
        levels.append(level)
        titles.append(f"level {level}: #{latent} {index.name(latent)} {value:.2f}" if near else "")
    return shares, levels, titles


def _token_latents(loaded: LoadedSAE, index: LatentIndex, found: Reading, position: int) -> str:
    """The latents of a token, under the level that they belong to."""
    if found.skipped[position]:
        return drawing.note("A special token or an attention sink: the SAE never reads those.")
    parts = [f"<h3>Latents on “{drawing.visible(found.pieces[position].strip() or found.pieces[position])}”</h3>"]
    sizes = [0, *loaded.prefix_sizes]
    for level, (low, high) in enumerate(pairwise(sizes)):
        here = [(latent, value) for latent, value in found.active[position] if low <= latent < high]
        if not here:
            continue
        rows = [
            drawing.latent_button(latent, index.name(latent), level, extra=f"{value:.2f}", with_level=False)
            for latent, value in here[:NUM_SHOWN]
        ]
        more = f" (strongest {NUM_SHOWN} of {len(here)})" if len(here) > NUM_SHOWN else ""
        parts.append(f"<h4>Level {level}{more}</h4>{drawing.listing(rows, '')}")
    return "".join(parts) if len(parts) > 1 else drawing.note("No latent is active on this token.")


def draw_page(loaded: LoadedSAE, index: LatentIndex, latent: int | None) -> str:
    """One latent: what it fires on, what it promotes, its relatives."""
    latent = loaded.here(latent)
    if latent is None:
        return drawing.note("No latent is open. Click one, or type its number.")
    view = index.page(latent)
    maximum, rate = loaded.maxima[latent], loaded.firing_rates[latent]
    facts = f"In training it fired on {100 * rate:.2g}% of tokens, with at most {maximum:.3g}."
    buttons = drawing.button("Steer with it", "steer", latent, primary=True)
    buttons += drawing.button("Steer only where it fires", "condition", latent)
    head = draw_head(loaded, index, latent, buttons)
    if view is None:
        return head + drawing.note(f"{facts} {index.progress}")
    if view.is_dead:
        return head + drawing.note(f"{facts} It never fired on the text that was read.")
    score = (
        ""
        if view.label is None or view.label.detection is None
        else f" Label: detection AUC {view.label.detection:.2f}."
    )
    return "".join(
        [
            head,
            drawing.note(facts + score),
            drawing.section("Where it fires most", draw_contexts(loaded, view, NUM_CONTEXTS)),
            drawing.section(
                "How strongly it fires",
                drawing.bars(view.histogram, "0", f"{view.histogram_range:.3g}", "activation, where it fires"),
            ),
            drawing.columns(_tokens("Promotes", view.promoted), _tokens("Suppresses", view.suppressed)),
            draw_relatives(loaded, index, view),
            drawing.section("Nearest by decoder cosine", draw_hits(loaded, index, _nearest(view), "Nothing.")),
        ]
    )


def draw_head(loaded: LoadedSAE, index: LatentIndex, latent: int, buttons: str) -> str:
    """A latent's level, number and name, and buttons."""
    level = loaded.level_of(latent)
    where = f'<span class="msae-level">{loaded.level_name(level)}</span>'
    return (
        f'<header class="msae-page-head msae-hue-{level % 6}">{where}'
        f'<h2><span class="msae-number">#{latent}</span> {drawing.text(index.name(latent))}</h2>{buttons}</header>'
    )


def draw_contexts(loaded: LoadedSAE, view: LatentPage, number: int) -> str:
    """Stretches of text on which the latent is strongest."""
    level = loaded.level_of(view.latent)
    rows = "".join(
        "<li>"
        + drawing.tokens(
            one.tokens,
            strengths(one, view.max_activation),
            hue=level,
            marked=one.position,
            titles=[f"{value:.2f}" for value in one.activations],
            special=are_special(loaded, one.tokens),
            clickable=False,
        )
        + "</li>"
        for one in view.top[:number]
    )
    return f'<ol class="msae-contexts">{rows}</ol>'


def draw_hits(loaded: LoadedSAE, index: LatentIndex, hits: Sequence[Hit], empty: str) -> str:
    """Latents to choose, each with why it is there."""
    rows = [
        drawing.latent_button(one.latent, index.name(one.latent), loaded.level_of(one.latent), extra=one.why)
        for one in hits
    ]
    return drawing.listing(rows, empty)


def draw_relatives(loaded: LoadedSAE, index: LatentIndex, view: LatentPage) -> str:
    """More general and more specific latents, beside each other where there are both."""
    parents, children = index.parents(view.latent), index.children(view.latent)
    up = drawing.section("More general", draw_hits(loaded, index, parents, "Nothing above it."))
    down = drawing.section("More specific", draw_hits(loaded, index, children, "Nothing below it."))
    if not parents and not children:
        return drawing.section("More general or specific", drawing.note("No other level has a relative of it."))
    return (drawing.columns(up, down) if parents and children else up + down) + drawing.note(
        "Percentages: on how much of what the general one fires on, the special one fires, too. Sure: how far beyond "
        "chance the general one fires where the special one does; 0 is chance, 1 is always."
    )


def _nearest(view: LatentPage) -> list[Hit]:
    return [Hit(one.latent, f"cosine {one.cosine:.2f}") for one in view.nearest]


def _tokens(title: str, effects: Sequence[TokenEffect]) -> str:
    rows = "".join(
        f'<li><code>{drawing.visible(one.token)}</code><span class="msae-extra">{one.effect:+.3f}</span></li>'
        for one in effects[:NUM_SHOWN]
    )
    body = f'<ul class="msae-words">{rows}</ul>' if rows else drawing.note("Not known for this site.")
    return drawing.section(title, body)
