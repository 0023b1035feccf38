"""What a browser sent, checked.

Whatever the page's own components give, anybody can send anything to any handler. Each function returns what was asked
for or raises SpaceError in one sentence.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

from msae_space.loaded_sae import SpaceError

MAX_TEXT, MAX_WORDS = 2000, 200
# Numbers that JavaScript keeps exactly; larger ones count nothing on this page.
MAX_NUMBER = 2**53
UNREADABLE = "The page sent something unreadable; reload it."


def words(value: Any, what: str, most: int = MAX_TEXT) -> str:
    """A text of at most `most` characters; None is the empty one."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SpaceError(f"{what} must be text. {UNREADABLE}")
    if len(value) > most:
        raise SpaceError(f"{what} has {len(value):,} characters; this page takes up to {most:,}. Shorten it.")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise SpaceError(f"{what} holds half of a character, which no tokenizer can read; type it again.")
    return value


def number(value: Any, what: str, low: float, high: float) -> float:
    """A finite number in the range, ends included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise SpaceError(f"{what} must be a finite number from {low:,g} to {high:,g}.")
    return float(value)


def whole(value: Any, what: str, low: int, high: int) -> int:
    """A whole number in the range, ends included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or value % 1:
        raise SpaceError(f"{what} must be a whole number from {low:,} to {high:,}.")
    return int(value)


def choice(value: Any, what: str, known: Collection[str]) -> str:
    """One of the names that are known."""
    if not isinstance(value, str) or value not in known:
        raise SpaceError(f"There is no {what} {str(value)[:40]!r}; there are {', '.join(known)}.")
    return value


def decimal(text: str) -> int | None:
    """The whole number from 0 that a text writes with decimal digits; None for any other text."""
    # Python reads no number of thousands of digits, and no latent or level has a number of twenty.
    return int(text) if text.isdecimal() and len(text) < 20 else None


class Click(NamedTuple):
    """What was clicked inside a piece of HTML: its `data-do` and its `data-id`."""

    action: str
    id: int


def click(sent: Any, *actions: str) -> Click:
    """The click that an event's data describe: one of the actions that the piece offers."""
    action, target = (sent.get("action"), sent.get("id")) if isinstance(sent, dict) else (None, None)
    if action not in actions or isinstance(target, bool) or not isinstance(target, int | float):
        raise SpaceError(UNREADABLE)
    if not math.isfinite(target) or target % 1 or abs(target) > MAX_NUMBER:
        raise SpaceError(UNREADABLE)
    return Click(action, int(target))
