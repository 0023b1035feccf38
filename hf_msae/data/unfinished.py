"""A folder that is written shard by shard for hours, beside its own name, and renamed when it is whole.

So a folder that exists is complete. Until then it keeps what it is made from and how far it has come after each shard,
and the same call made again goes on there; another call is refused.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_msae.atomic_files import remove_drafts
from hf_msae.data.cache_files import INDEX, PROGRESS, unfinished_folder, write_json
from hf_msae.errors import InputError


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
