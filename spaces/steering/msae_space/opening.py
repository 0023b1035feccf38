"""Opening an SAE, or what a link describes: the new value of everything on the page that depends on it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr

from hf_msae.errors import HfMsaeError
from hf_msae.worlds.stories import STORIES
from msae_space import drawing, tab_compare, tab_explore, tab_find, tab_levels, tab_steer, tab_tree, validation
from msae_space.dials import draw_dials
from msae_space.library import Library, short
from msae_space.links import MAX_NAME, View
from msae_space.loaded_sae import Key, LoadedSAE, SpaceError
from msae_space.shared import Shared
from msae_space.strengths import Condition, Dial

Updates = dict[gr.blocks.Block, Any]


class Head(NamedTuple):
    """What stands above the tabs. tab: State, the name of the open one."""

    source: gr.Dropdown
    inside: gr.Dropdown
    status: gr.HTML
    share: gr.Button
    link: gr.Textbox
    tab: gr.State


class Page(NamedTuple):
    """Everything on the page, and what it shows at first."""

    head: Head
    shared: Shared
    steer: tab_steer.SteerTab
    find: tab_find.FindTab
    explore: tab_explore.ExploreTab
    tree: tab_tree.TreeTab
    levels: tab_levels.LevelsTab
    compare: tab_compare.CompareTab
    prompt: str
    text: str

    def of_sae(self) -> list[Any]:
        """The components that `opened` sets."""
        shown = [self.head.status, self.head.inside, self.steer.presets, self.tree.view, self.explore.colour]
        return [self.shared.key, self.shared.dials, *shown, self.levels.level, *self.compare.levels]

    def of_link(self) -> list[Any]:
        """The components that `restored` sets."""
        controls = [one for one in self.steer.controls if one is not self.shared.dials]
        places = [self.head.source, self.shared.tabs, self.head.tab, self.shared.latent]
        return [*self.of_sae(), *controls, *places, self.explore.text, self.levels.text, self.compare.text]


def find(library: Library, source: Any, inside: Any) -> Key:
    """The SAE that was chosen, or the first of a repo. Raises SpaceError, or hf_msae's NoSAEError."""
    source = validation.words(source, "The SAE", MAX_NAME).strip()
    if not source:
        raise SpaceError("Choose an SAE, or paste the id of a Hub repo such as owner/name.")
    if inside is None:
        return Key(source, library.entries(source)[0].subfolder)
    return Key(source, validation.words(inside, "The SAE's folder", MAX_NAME))


def opened(
    page: Page, key: Key, method: str, dials: Sequence[Dial] = (), conditions: Sequence[Condition] = ()
) -> Updates:
    """The page with this SAE open. Raises SpaceError, or hf_msae's NoSAEError."""
    shared = page.shared
    loaded = shared.library.open(key)
    index, here = shared.index_of(loaded), [key.source, key.subfolder]
    index.try_again()
    for one in (*dials, *conditions):
        loaded.checked(one.latent)
    names = [entry.subfolder for entry in shared.library.entries(key.source)]
    levels = tab_compare.level_choices(loaded)
    left, right = page.compare.levels
    return {
        shared.key: here,
        page.head.status: _status(loaded),
        page.head.inside: gr.Dropdown(names, value=key.subfolder, visible=len(names) > 1),
        shared.dials: draw_dials(loaded, index, dials, method, conditions),
        page.steer.presets: tab_steer.draw_presets(shared, here),
        page.explore.colour: gr.Dropdown(tab_explore.colour_choices(loaded), value=tab_explore.ALL_LEVELS),
        page.tree.view: tab_tree.draw_walk(loaded, index, []),
        page.levels.level: gr.Slider(maximum=max(1, len(levels) - 1), value=0),
        left: gr.Dropdown(levels, value="0"),
        right: gr.Dropdown(levels, value=str(len(levels) - 1)),
    }


def restored(page: Page, view: View) -> Updates:
    """The page as a link describes it; a broken link opens what can be opened, and says what could not."""
    shared, key, problems = page.shared, view.key, list(view.problems)
    try:
        updates = opened(page, key, view.method, view.dials, view.conditions)
    except HfMsaeError as error:
        problems.append(str(error))
        key = find(shared.library, shared.library.own[0], None)
        updates = opened(page, key, view.method)
    if problems:
        words = "Parts of the link could not be restored: " + "; ".join(problems)
        updates[page.head.status] += drawing.note(words, "problem")
    loaded = shared.library.open(key)
    if view.level is not None:
        highest = max(1, len(loaded.prefix_sizes) - 1)
        updates[page.levels.level] = gr.Slider(maximum=highest, value=min(view.level, highest))
    controls = page.steer.controls
    text = view.text or page.text
    return {
        **updates,
        page.head.source: gr.Dropdown(value=key.source),
        controls.prompt: view.prompt or page.prompt,
        controls.method: view.method,
        controls.positions: view.positions,
        controls.temperature: view.temperature,
        controls.length: view.max_new_tokens,
        controls.seed: view.seed,
        shared.tabs: gr.Tabs(selected=view.tab),
        page.head.tab: view.tab,
        shared.latent: view.latent if (view.latent or 0) < loaded.sae.config.num_latents else None,
        page.explore.text: text,
        page.levels.text: text,
        page.compare.text: text,
    }


def choices(library: Library) -> list[tuple[str, str]]:
    """The SAEs that the Space offers, by their short names."""
    return [(short(source), source) for source in library.own]


def _status(loaded: LoadedSAE) -> str:
    config = loaded.sae.config
    model = "the story model" if config.base_model == STORIES else config.base_model
    sizes = ", ".join(f"{size:,}" for size in loaded.prefix_sizes)
    measured = config.measured or {}
    fve = f" · FVE {measured['fve'][-1]:.3f}" if measured.get("fve") else ""
    facts = f"{config.num_latents:,} latents in levels of {sizes} · L0 {config.k:g}{fve}"
    return drawing.note(f"Reads {config.site} of {model} · {facts}")
