"""What the tabs have in common: the SAE that is open, the visitor's state, and errors in words."""

import functools
import html
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gradio as gr

from hf_msae.errors import HfMsaeError
from msae_space.latent_index import LatentIndex
from msae_space.library import Library
from msae_space.loaded_sae import Key, LoadedSAE
from msae_space.validation import MAX_TEXT, UNREADABLE

BROKEN = (
    "Something broke here that is no fault of yours, and the Space's log says what. Try again; if it breaks again, "
    "reload the page."
)
logger = logging.getLogger(__name__)


@dataclass
class Shared:
    """What all tabs read or write.

    Args:
        library: Where SAEs are opened.
        key: State, [source, subfolder] of the open SAE.
        latent: State, the latent whose page is open.
        tabs: The row of tabs, so that a button of one can lead to another.
        dials: The component of the steered latents.
        method: What is done with them.
    """

    library: Library
    key: gr.State
    latent: gr.State
    tabs: gr.Tabs
    dials: gr.HTML
    method: gr.Dropdown

    def loaded(self, key: list[str]) -> LoadedSAE:
        """The SAE that this visitor has open."""
        return self.library.open(Key(*key))

    def index(self, key: list[str]) -> LatentIndex:
        """What is known about the latents of the SAE that this visitor has open."""
        return self.index_of(self.loaded(key))

    def index_of(self, loaded: LoadedSAE) -> LatentIndex:
        """What is known about an SAE's latents; it is found out in the background from the first call on."""
        return self.library.companion(loaded, LatentIndex)


def text_box(text: str, name: str, button: str) -> gr.Textbox:
    """Where a visitor types the text that a tab looks at; `name` is its id, `button` stands beside it."""
    return gr.Textbox(text, label="Text", lines=2, max_lines=8, max_length=MAX_TEXT, elem_id=name, submit_btn=button)


class Blocks(gr.Blocks):
    """Gradio's, whose own complaints about what a browser sent reach the visitor as a sentence."""

    async def preprocess_data(self, *args: Any, **kwargs: Any) -> list[Any]:
        """As Gradio's, with the errors in a sentence."""
        try:
            return await super().preprocess_data(*args, **kwargs)
        except gr.Error as error:  # a number outside of its slider, a choice that is none
            raise refusal(str(error.message)[:200]) from error
        except Exception as error:  # all that it is given here comes from a browser
            raise refusal(UNREADABLE) from error


def refusal(words: str) -> gr.Error:
    """A message to the visitor. Its words are escaped: the message is HTML."""
    return gr.Error(html.escape(words), duration=12, title="That did not work", print_exception=False)


def reports_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """The handler, whose errors reach the visitor as a message.

    What a visitor can mend is told in its own words. Faults of this code go to the log, and a message says so.
    """

    @contextmanager
    def reporting() -> Iterator[None]:
        try:
            yield
        except gr.Error:
            raise
        except HfMsaeError as error:
            raise refusal(str(error)) from error
        except Exception as error:  # a fault of ours: the log has it, and the page says only that
            logger.exception("The page's handler %r failed.", function.__qualname__)
            raise refusal(BROKEN) from error

    if _is_generator(function):

        @functools.wraps(function)
        def stream(*args: Any, **kwargs: Any) -> Any:
            with reporting():
                yield from function(*args, **kwargs)

        return stream

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with reporting():
            return function(*args, **kwargs)

    return call


def _is_generator(function: Callable[..., Any]) -> bool:
    return bool(function.__code__.co_flags & 0x20)
