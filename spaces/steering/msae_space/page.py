"""The page: which SAE is open, six tabs, and the link that restores them."""

from dataclasses import replace
from typing import Any

import gradio as gr

from hf_msae.worlds.stories import STORIES
from msae_space import (
    drawing,
    opening,
    tab_compare,
    tab_explore,
    tab_find,
    tab_levels,
    tab_steer,
    tab_tree,
    tools,
    validation,
)
from msae_space.latent_index import LatentIndex
from msae_space.library import Library
from msae_space.links import MAX_LEVEL, TABS, read_query
from msae_space.loaded_sae import Key
from msae_space.opening import Head, Page
from msae_space.settings import Settings
from msae_space.shared import Blocks, Shared, reports_errors
from msae_space.tab_find import SEARCHES
from msae_space.tab_steer import RUNS, view_of

STORY_PROMPT = "Once upon a time, there was a"
STORY_TEXT = (
    "Once upon a time, there was a little owl. She lived in the forest. One sunny morning, Lily went to the garden "
    "with her mother. They ate cakes and played with a red ball."
)
OTHER_PROMPT = "I think that"
OTHER_TEXT = "The quick brown fox jumps over the lazy dog while the king of France sleeps in Paris."
# Shows the link in the address bar and puts it on the clipboard where the browser lets us.
SHARE = """(query) => {
  const link = location.origin + location.pathname + '?' + query;
  history.replaceState(null, '', link);
  if (navigator.clipboard) navigator.clipboard.writeText(link).catch(() => {});
  return link;
}"""
# A link shows what its sender saw: the same seed gives the same text.
WRITE_AGAIN = """() => {
  if (new URLSearchParams(location.search).has('prompt')) document.querySelector('#generate')?.click();
}"""
QUEUE_SIZE = 64


def build(settings: Settings) -> gr.Blocks:
    """The app, its first SAE open and being read."""
    library = Library(settings.saes)
    first = opening.find(library, settings.saes[0], None)
    loaded = library.open(first)
    library.companion(loaded, LatentIndex)
    stories = loaded.sae.config.base_model == STORIES
    prompt, text = (STORY_PROMPT, STORY_TEXT) if stories else (OTHER_PROMPT, OTHER_TEXT)
    with Blocks(title=settings.title, analytics_enabled=False, fill_width=False) as demo:
        key, latent = gr.State([first.source, first.subfolder]), gr.State(None)
        head = _head(settings.title, library, first)
        dials, method = tab_steer.build_dials()
        with gr.Tabs(selected="steer", elem_id="tabs") as tabs:
            shared = Shared(library, key, latent, tabs, dials, method)
            with gr.Tab("Steer", id="steer"):
                steer = tab_steer.build(shared, prompt)
            with gr.Tab("Find", id="find"):
                found = tab_find.build(shared)
            with gr.Tab("Explore", id="explore") as second:
                explore = tab_explore.build(shared, text)
            with gr.Tab("Tree", id="tree"):
                tree = tab_tree.build(shared)
            with gr.Tab("Levels", id="levels") as fourth:
                levels = tab_levels.build(shared, text)
            with gr.Tab("Compare", id="compare") as fifth:
                compare = tab_compare.build(shared, text, settings.meta_sae)
        page = Page(head, shared, steer, found, explore, tree, levels, compare, prompt, text)
        _remember_tab(tabs, head.tab)
        _begin(shared, (second, explore), (fourth, levels), (fifth, compare))
        _fill_in(shared, steer, tree)
        _open_others(page)
        found.applied.change(*steer.writing.parts, **steer.writing.options)
        _restore_links(page, demo, first)
        _share(page)
        demo.unload(_leave)
        tools.add_tools(library)
    demo.queue(max_size=QUEUE_SIZE, default_concurrency_limit=8)
    return demo


def _head(title: str, library: Library, first: Key) -> Head:
    with gr.Row(equal_height=True, elem_id="title-row"):
        gr.HTML(f'<h1 class="msae-title">{drawing.text(title)}</h1>')
        share = gr.Button("Share", elem_id="share", scale=0, min_width=90)
    link = gr.Textbox(label="Link that restores this page", visible=False, buttons=["copy"], elem_id="link")
    with gr.Row(equal_height=False, elem_id="source-row"):
        source = gr.Dropdown(
            opening.choices(library),
            value=first.source,
            allow_custom_value=True,
            label="SAE (choose, or paste a Hub repo)",
            elem_id="source",
            scale=2,
            min_width=240,
        )
        inside = gr.Dropdown([], label="Which of its SAEs", visible=False, elem_id="inside", scale=1, min_width=160)
        status = gr.HTML(elem_id="status")
    return Head(source, inside, status, share, link, gr.State("steer"))


def _open_others(page: Page) -> None:
    """Another SAE, or another one of the same repo."""
    head, shared = page.head, page.shared

    @reports_errors
    def open_sae(source: str, inside: str | None, method: str) -> opening.Updates:
        return opening.opened(page, opening.find(shared.library, source, inside), method)

    def clear() -> tuple[Any, ...]:
        return None, None, None, [], None, "", None, ""

    quiet: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}
    cleared = [shared.latent, page.explore.reading, page.levels.found, page.tree.walk, page.compare.view]
    cleared += [page.steer.results, page.find.found, page.find.view]
    for event, inside in ((head.source.input, gr.State(None)), (head.inside.input, head.inside)):
        found = event(open_sae, [head.source, inside, shared.method], page.of_sae(), **quiet)
        found.success(clear, None, cleared, **quiet)


def _restore_links(page: Page, demo: gr.Blocks, first: Key) -> None:
    @reports_errors
    def restore(request: gr.Request) -> opening.Updates:
        return opening.restored(page, read_query(dict(request.query_params), first))

    restoring = demo.load(restore, None, page.of_link(), show_progress="minimal", api_visibility="private")
    restoring.then(fn=None, inputs=None, outputs=None, js=WRITE_AGAIN)


def _share(page: Page) -> None:
    head, shared = page.head, page.shared
    inputs = [shared.key, head.tab, page.explore.text, shared.latent, page.levels.level, *page.steer.controls]

    @reports_errors
    def query(key: list[str], tab: str, text: str, latent: int | None, level: float, *run: Any) -> Any:
        text, level = validation.words(text, "The text"), validation.whole(level, "The level", 0, MAX_LEVEL)
        view = replace(view_of(shared, key, *run), tab=tab, text=text, latent=latent, level=level)
        return gr.Textbox(view.query(), visible=True)

    quiet: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}
    # By way of the visible box, since a State's value never reaches the browser's JavaScript.
    head.share.click(query, inputs, head.link, **quiet).success(None, head.link, head.link, js=SHARE)


def _leave(request: gr.Request) -> None:
    for runs in (RUNS, SEARCHES):
        runs.stop(str(request.session_hash))


def _remember_tab(tabs: gr.Tabs, tab: gr.State) -> None:
    @reports_errors
    def remember(event: gr.EventData) -> str:
        sent = event._data if isinstance(event._data, dict) else {}
        return validation.choice(str(sent.get("value")).lower(), "tab", TABS)

    tabs.select(remember, None, tab, show_progress="hidden", api_visibility="private")


def _begin(
    shared: Shared,
    explore: tuple[gr.Tab, tab_explore.ExploreTab],
    levels: tuple[gr.Tab, tab_levels.LevelsTab],
    compare: tuple[gr.Tab, tab_compare.CompareTab],
) -> None:
    """A tab that is opened the first time shows its example, rather than nothing."""
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def once(function: Any, number: int) -> Any:
        """The function, where what it makes is not there yet (its last argument)."""

        def first(*values: Any) -> Any:
            nothing = gr.skip() if number == 1 else (gr.skip(),) * number
            return nothing if values[-1] else function(*values[:-1])

        return first

    tab, parts = explore
    inputs: list[Any] = [shared.key, parts.text, parts.reading]
    read = tab.select(once(parts.read, 2), inputs, [parts.reading, parts.token], **quiet)
    drawn = read.success(parts.draw, parts.state, [parts.tokens, parts.details], **quiet)
    drawn.success(parts.tell, [shared.key, parts.reading, shared.latent], shared.latent, **quiet)
    tab, shown = levels
    tab.select(once(shown.measure, 1), [shared.key, shown.text, shown.found], shown.found, **quiet).success(
        shown.draw, [shared.key, shown.found, shown.level], shown.view, **quiet
    )
    tab, sides = compare
    tab.select(once(sides.compare, 1), [*sides.inputs, sides.view], sides.view, **quiet)


def _fill_in(shared: Shared, steer: tab_steer.SteerTab, tree: tab_tree.TreeTab) -> None:
    """Looks now and then whether the latents have been read, and shows presets and the tree when they have."""
    timer, shown = gr.Timer(1.0), gr.State(None)

    @reports_errors
    def fill(key: list[str], walk: list[int], before: str | None) -> tuple[Any, ...]:
        loaded, index = shared.loaded(key), shared.index(key)
        progress, again = index.progress, gr.Timer(active=index.is_learning)
        if progress == before:  # drawing anew would take the keyboard from whoever is there
            return gr.skip(), gr.skip(), gr.skip(), again
        drawn = tab_tree.draw_walk(loaded, index, walk)
        return tab_steer.draw_presets(shared, key), drawn, progress, again

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    inputs, outputs = [shared.key, tree.walk, shown], [steer.presets, tree.view, shown, timer]
    timer.tick(fill, inputs, outputs, **quiet)
    shared.key.change(lambda: (gr.Timer(active=True), None), None, [timer, shown], **quiet)
