"""Files and folders that are whole or absent: written beside their place, and renamed into it.

A reader that comes at any moment, and a process that is killed at any moment, so find what was there before or what is
there after, and nothing between.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_msae.errors import OutputExistsError


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `path` at the end; a failure leaves `path` as it was.

    Args:
        path: The file. One that is there is replaced; folders above it are made.

    Yields:
        A name beside `path` that no other writer has, so that several may write the same file at once.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft_of(target)
    try:
        yield draft
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a new folder to write into, which takes its place at the end; a failure leaves nothing.

    Args:
        path: The folder, absent or empty; folders above it are made.

    Yields:
        An empty folder beside `path`.

    Raises:
        OutputExistsError: Where something is at `path` already.
    """
    # A folder cannot take the place of a link; it takes the place of where the link leads.
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OutputExistsError(f"{path} is a link that leads to itself; remove it, or name another folder.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputExistsError(f"{path} exists and is not an empty folder; name another, or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft_of(target)
    draft.mkdir()
    try:
        yield draft
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def remove_drafts(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder to which nobody else writes now."""
    for draft in folder.glob(".*.part"):
        if draft.is_file():
            draft.unlink()


def _draft_of(target: Path) -> Path:
    """A hidden name, which nobody takes for a result where a killed process left it."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.part")
