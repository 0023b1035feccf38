"""Checks of the states that readers of data go on from: they come out of files, which may be damaged."""

from collections.abc import Mapping
from typing import Any

from hf_msae.errors import InputError


def check_state(state: Any, *counts: str) -> Mapping[str, Any]:
    """The state, if it is one.

    Args:
        state: What a file holds.
        counts: Its keys whose values must be whole numbers from 0.

    Raises:
        InputError: It is no mapping, or something else stands under one of the keys.
    """
    if not isinstance(state, Mapping):
        raise InputError(f"the state of the data is damaged: it is {state!r:.80}, no mapping")
    wrong = [key for key in counts if type(state.get(key)) is not int or state[key] < 0]
    if wrong:
        raise InputError(
            f"the state of the data is damaged: {wrong[0]!r} is {state.get(wrong[0])!r:.80}, no whole number from 0"
        )
    return state
