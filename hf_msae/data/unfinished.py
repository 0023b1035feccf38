"""A folder that is written shard by shard for hours, beside its own name, and renamed when it is whole.

So a folder that exists is complete. Until then it keeps what it is made from and how far it has come after each shard,
and the same call made again goes on there; another call is refused.

Somebody else may have written or damaged what is read here, so contents are checked before they are believed.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_msae.atomic_files import atomic_file, remove_drafts
from hf_msae.errors import InputError
from hf_msae.modeling.untrusted import read_json

INDEX = "index.json"
PROGRESS = "progress.json"
# An index has some eighty bytes a shard, and a stream's state as many for each of its files.
MAX_INDEX_BYTES = 1 << 26


def unfinished_folder(directory: Path) -> Path:
    """Where a folder lies before it is whole."""
    return directory.with_name(directory.name + ".incomplete")


def read_contents(path: Path, error: type[InputError], what: str) -> dict[str, Any]:
    """What an index or a progress file holds.

    Args:
        path: of the file.
        error: raised where it is no JSON object.
        what: is to be written anew then, such as "the cache".
    """
    try:
        return read_json(path, max_bytes=MAX_INDEX_BYTES)
    except ValueError as cause:
        raise error(f"{cause} (Remove the folder {path.parent}, and write {what} anew.)") from cause


def check_contents(
    contents: Mapping[str, Any],
    path: Path,
    checks: Mapping[str, Callable[[Any], bool]],
    error: type[InputError],
    what: str,
) -> None:
    """Raise `error`, with the arguments of `read_contents`, where a value is not what it must be.

    Args:
        contents: what was read.
        path: where from.
        checks: of the values, by their names.
        error: see there.
        what: see there.
    """
    wrong = next((key for key, check in checks.items() if not check(contents.get(key))), None)
    if wrong is not None:
        raise error(
            f"{path} is damaged: its {wrong!r} is {contents.get(wrong)!r:.80}. Remove the folder {path.parent}, and "
            f"write {what} anew."
        )


def is_mapping(value: Any) -> bool:
    """Whether it is a JSON object."""
    return isinstance(value, dict)


def are_shards(value: Any, name: re.Pattern[str], size: str, least: int) -> bool:
    """Whether it is a list of shards, whose names lead nowhere else and whose sizes are numbers.

    Args:
        value: what was read.
        name: what files are called.
        size: the key of how much a shard holds.
        least: how much that is at least.
    """
    return isinstance(value, list) and all(
        isinstance(shard, dict)
        and isinstance(shard.get("file"), str)
        and name.fullmatch(shard["file"]) is not None
        and type(shard.get(size)) is int
        and shard[size] >= least
        for shard in value
    )


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a file that is whole or absent."""
    with atomic_file(path) as draft:
        draft.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


class UnfinishedFolder:
    """One run of whatever writes such a folder.

    Args:
        directory: the folder to make, which must not exist.
        what: it holds, for errors: "an unfinished cache".
        error: raised for a folder that this run cannot go on with.
        read_progress: reads and checks what `save` wrote.

    Attributes:
        path: where its files lie until it is whole.
    """

    def __init__(
        self,
        directory: Path,
        what: str,
        error: type[InputError],
        read_progress: Callable[[Path], dict[str, Any]],
    ) -> None:
        self.directory, self.path = directory, unfinished_folder(directory)
        self._what, self._error, self._read_progress = what, error, read_progress

    def begin(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Make the folder, or take up the one that an earlier run left.

        Args:
            settings: what is written is made from; JSON can hold it.

        Returns:
            What that run saved last; None where there is nothing to go on from.

        Raises:
            InputError: of the kind given, where the other run had other settings, or its progress cannot be read.
        """
        progress_file = self.path / PROGRESS
        if not progress_file.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            return None
        progress = self._read_progress(progress_file)
        then = progress["settings"]
        changed = [key for key in settings if settings[key] != then.get(key)]
        if changed:
            raise self._error(
                f"{self.path} holds {self._what} with another {' and '.join(changed)} "
                f"({', '.join(repr(then.get(key)) for key in changed)}, now "
                f"{', '.join(repr(settings[key]) for key in changed)}). Remove it to begin anew, or use the same "
                "settings."
            )
        remove_drafts(self.path)
        return progress

    def no_place(self, error: InputError) -> InputError:
        """What to raise where the data cannot go on from the place that was saved."""
        return self._error(
            f"{self.path / PROGRESS} does not say where the data goes on ({error!s:.200}). Remove the folder "
            f"{self.path} to begin anew."
        )

    def save(self, settings: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        """Note how far it has come, after each shard; the file is whole or absent."""
        write_json(self.path / PROGRESS, {"settings": dict(settings), **progress})

    def finish(self, index: Mapping[str, Any]) -> Path:
        """Write the index, and give the folder its name."""
        write_json(self.path / INDEX, index)
        self.path.rename(self.directory)
        (self.directory / PROGRESS).unlink()
        return self.directory
