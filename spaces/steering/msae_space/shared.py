"""What the tabs have in common: the SAE that is open, the visitor's state, and errors in words."""

import functools
import html
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gradio as gr

from hf_msae.hub.index import NoSAEError
from hf_msae.interpret.store import InterpretationError
from hf_msae.sites import SiteError
from hf_msae.steering import SteeringError
from msae_space.asked import MAX_TEXT, UNREADABLE
from msae_space.library import Library
from msae_space.meaning import Meaning, Meanings
from msae_space.workbench import Key, SpaceError, Workbench

# What a visitor can mend. Anything else is a fault of ours: it is logged, and the page says only that.
TOLD = (SpaceError, SteeringError, SiteError, NoSAEError, InterpretationError)
BROKEN = (
    "Something broke here that is no fault of yours, and the Space's log says what. Try again; if it breaks again, "
    "reload the page."
)
logger = logging.getLogger(__name__)


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


class Blocks(gr.Blocks):
    """Gradio's, whose own complaints about what a browser sent are told in a sentence."""

    async def preprocess_data(self, *args: Any, **kwargs: Any) -> list[Any]:
        try:
            return await super().preprocess_data(*args, **kwargs)
        except gr.Error as error:  # a number outside of its slider, a choice that is none
            raise refusal(str(error.message)[:200]) from error
        except Exception as error:  # all that it is given here comes from a browser
            raise refusal(UNREADABLE) from error


def refusal(words: str) -> gr.Error:
    """A message to the visitor. Its words are escaped: the message is HTML."""
    return gr.Error(html.escape(words), duration=12, title="That did not work", print_exception=False)


def told(function: Callable) -> Callable:
    """The handler, whose refusals reach the visitor as a message. Its faults go to the log, and a message says so."""

    @contextmanager
    def telling() -> Iterator[None]:
        try:
            yield
        except gr.Error:
            raise
        except TOLD as error:
            raise refusal(str(error)) from error
        except Exception as error:
            logger.exception("The page's handler %r failed.", function.__qualname__)
            raise refusal(BROKEN) from error

    if _is_generator(function):

        @functools.wraps(function)
        def stream(*args: Any, **kwargs: Any) -> Any:
            with telling():
                yield from function(*args, **kwargs)

        return stream

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with telling():
            return function(*args, **kwargs)

    return call


def _is_generator(function: Callable) -> bool:
    return bool(function.__code__.co_flags & 0x20)
