"""What takes long to make, once a session: the worker that needs it first makes it, and all read it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from patience import HANG_SECONDS


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name, which all workers share and none may change.

    Args:
        factory: pytest's own.
        name: of the folder, the same for all that share it.
        make: fills the folder, whose parent exists.
    """
    root = factory.getbasetemp()
    shared = root.parent if root.name.startswith("popen-") else root  # each worker of pytest-xdist has a folder there
    folder, draft = shared / name, shared / f"{name}.draft"
    with FileLock(shared / f"{name}.lock", timeout=HANG_SECONDS):
        if not folder.exists():
            make(draft)
            draft.rename(folder)
    return folder
