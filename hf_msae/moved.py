"""Names under which things could be imported in the version before, and go on being for one more.

A module that moved leaves a file of two lines where it was; a name that moved out of a package that stays, one line in
it. Both import the new place only when they are used.
"""

import warnings
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any


def moved(
    old: str, new: str, names: Collection[str] | None = None, otherwise: Callable[[str], Any] | None = None
) -> Callable[[str], Any]:
    """A module's `__getattr__` that takes what it is asked for from another module, with a `DeprecationWarning`.

    Args:
        old: the module that it is for, its `__name__`.
        new: the full name of the module that has the names now.
        names: what moved; by default everything.
        otherwise: the `__getattr__` that knows the other names, where the module has one.

    Returns:
        The function to call `__getattr__` in the old module.
    """

    def look_up(name: str) -> Any:
        # Python itself asks every module for names such as `__path__`, which say what that module is.
        if name.startswith("__") or (names is not None and name not in names):
            if otherwise is not None:
                return otherwise(name)
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        found = getattr(import_module(new), name)
        warnings.warn(
            f"{old}.{name} is now {new}.{name}; the old name goes with the next version.",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return look_up
