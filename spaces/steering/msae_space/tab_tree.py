"""Tree: walk from a coarse latent to the finer ones under it, and steer with any of them.

It is called a tree and is a graph: a latent may have several parents, and the page shows them all.
"""

from typing import Any, NamedTuple

import gradio as gr

from msae_space import drawing
from msae_space.dials import draw_with
from msae_space.drawing import ON_CLICK
from msae_space.latent_index import LatentIndex
from msae_space.loaded_sae import LoadedSAE
from msae_space.shared import Shared, reports_errors
from msae_space.tab_explore import draw_contexts, draw_head, draw_hits, draw_relatives
from msae_space.validation import click

NUM_ROOTS = 40
NUM_CONTEXTS = 3


class TreeTab(NamedTuple):
    """What the page wires up. walk: State, the latents from the root to where the visitor stands."""

    walk: gr.State
    view: gr.HTML


def build(shared: Shared) -> TreeTab:
    """The tab; call inside its `gr.Tab`."""
    walk = gr.State([])
    view = gr.HTML(js_on_load=ON_CLICK, elem_id="tree")
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    @reports_errors
    def choose(key: list[str], path: list[int], value: Any, method: str, event: gr.EventData) -> tuple[Any, ...]:
        loaded, index = shared.loaded(key), shared.index(key)
        nothing, clicked = [gr.skip()] * 4, click(event._data, "top", "steer", "page", "latent")
        if clicked.action == "top":
            return [], *nothing[1:]
        latent = loaded.checked(clicked.id)
        if clicked.action == "steer":
            dials = draw_with(loaded, index, value, latent, method)
            return nothing[0], dials, gr.Tabs(selected="steer"), nothing[3]
        if clicked.action == "page":
            return nothing[0], nothing[1], gr.Tabs(selected="explore"), latent
        if latent in path:
            return path[: path.index(latent) + 1], *nothing[1:]
        # A parent that the walk did not come by begins a walk of its own.
        path = [one for one in path if loaded.here(one) is not None]  # of an SAE that was open before, it may be
        below = path and latent in {one.latent for one in index.children(path[-1])}
        return ([*path, latent] if below else [latent]), *nothing[1:]

    @reports_errors
    def draw(key: list[str], path: list[int]) -> str:
        return draw_walk(shared.loaded(key), shared.index(key), path)

    view.click(
        choose,
        [shared.key, walk, shared.dials, shared.method],
        [walk, shared.dials, shared.tabs, shared.latent],
        **quiet,
    )
    walk.change(draw, [shared.key, walk], view, **quiet)
    return TreeTab(walk, view)


def draw_walk(loaded: LoadedSAE, index: LatentIndex, path: list[int]) -> str:
    """The roots, or the latent at the end of the walk with its parents and children."""
    if not index.has_pages:
        return drawing.note(index.progress)
    # Of another SAE, which was open when the walk was made.
    if not path or max(path) >= loaded.sae.config.num_latents:
        return drawing.note(
            "Coarse latents with finer ones under them. An edge says that where the child fires, the parent fires, "
            "too, far more often than chance; it is evidence, not proof."
        ) + draw_hits(loaded, index, index.roots()[:NUM_ROOTS], "No edge between levels passed the tests.")
    crumbs = '<button type="button" class="msae-link" data-do="top" data-id="0">All roots</button>' + "".join(
        '<span aria-hidden="true">›</span><button type="button" class="msae-link" data-do="latent" '
        f'data-id="{latent}">{drawing.text(index.name(latent))}</button>'
        for latent in path
    )
    return f'<nav class="msae-crumbs" aria-label="Walk">{crumbs}</nav>{_card(loaded, index, path[-1])}'


def _card(loaded: LoadedSAE, index: LatentIndex, latent: int) -> str:
    steer = drawing.button("Steer with it", "steer", latent, primary=True)
    head = draw_head(loaded, index, latent, steer + drawing.button("Its page", "page", latent))
    view = index.page(latent)
    if view is None:
        return head
    return f"{head}{draw_contexts(loaded, view, NUM_CONTEXTS)}{draw_relatives(loaded, index, view)}"
