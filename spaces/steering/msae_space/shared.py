"""What the tabs have in common: the SAE that is open, the visitor's state, and errors in words."""

import functools
import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from hf_msae.hub.index import NoSAEError
from hf_msae.interpret.store import InterpretationError
from hf_msae.sites import SiteError
from hf_msae.steering import SteeringError
from msae_space.library import Key, Library, SpaceError, Workbench
from msae_space.links import MAX_TEXT
from msae_space.meaning import Meaning, Meanings

# What a visitor can mend. Anything else is a fault of ours: it is logged, and the page says only that.
TOLD = (SpaceError, SteeringError, SiteError, NoSAEError, InterpretationError)


@dataclass
class Shared:
    """key: State, [source, subfolder] of the open SAE. latent: State, the latent whose page is open. tabs: the row of
    tabs, so that a button of one can lead to another. dials: the component of the steered latents.
    """

    library: Library
    meanings: Meanings
    key: gr.State
    latent: gr.State
    tabs: gr.Tabs
    dials: gr.HTML
    method: gr.Dropdown

    def bench(self, key: list[str]) -> Workbench:
        """The SAE that this visitor has open."""
        return self.library.open(Key(*key))

    def meaning(self, key: list[str]) -> Meaning:
        """What is known about its latents."""
        return self.meanings.of(self.bench(key))


def text_box(text: str, name: str, button: str) -> gr.Textbox:
    """Where a visitor types the text that a tab looks at; `name` is its id, `button` stands beside it."""
    return gr.Textbox(text, label="Text", lines=2, max_lines=8, max_length=MAX_TEXT, elem_id=name, submit_btn=button)


def told(function: Callable) -> Callable:
    """The handler, whose refusals reach the visitor as a message. Its words are escaped: the message is HTML."""

    def message(error: Exception) -> gr.Error:
        return gr.Error(html.escape(str(error)), duration=12, title="That did not work", print_exception=False)

    if _is_generator(function):

        @functools.wraps(function)
        def stream(*args: Any, **kwargs: Any) -> Any:
            try:
                yield from function(*args, **kwargs)
            except TOLD as error:
                raise message(error) from error

        return stream

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TOLD as error:
            raise message(error) from error

    return call


def _is_generator(function: Callable) -> bool:
    return bool(function.__code__.co_flags & 0x20)
