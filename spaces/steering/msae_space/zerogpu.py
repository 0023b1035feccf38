"""ZeroGPU lends a GPU for one call at a time; everywhere else these functions are left as they are.

A call that has a GPU runs in a forked process, so what it takes and gives is pickled: a `LoadedSAE` goes over by its
name (see `msae_space.library`), and nothing that belongs to a thread goes over at all.
"""

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def find_zerogpu() -> ModuleType | None:
    """ZeroGPU's package `spaces`, where this is a ZeroGPU Space.

    A folder that happens to be called `spaces` can be imported, too; only the real package has a `GPU`.
    """
    if importlib.util.find_spec("spaces") is None:
        return None
    spaces = importlib.import_module("spaces")
    return spaces if hasattr(spaces, "GPU") else None


def on_gpu(function: Function) -> Function:
    """The function, run with a GPU on a ZeroGPU Space."""
    spaces = find_zerogpu()
    return function if spaces is None else spaces.GPU(function)
