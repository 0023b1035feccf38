"""Checkpoints that are whole or absent, and that are checked before they are used.

A checkpoint is written into a folder beside its place and renamed into it, so a kill at any moment leaves the last
complete one. It holds what a reader can load as an SAE (`config.json`, `model.safetensors`, the modeling files) and
what only a resumed run needs: torch state read with `weights_only=True`, and JSON.

A disk may return something else than what was written, or less. So the trainer's state records the size and the
SHA-256 of every file, and a digest of itself; a checkpoint that does not match is set aside, and the one before it is
used. Hashing costs about a second per gigabyte, beside writing them.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hf_msae.errors import InputError

logger = logging.getLogger(__name__)

STATE_NAME = "trainer_state.json"
PATTERN = re.compile(r"checkpoint-(\d+)")
DRAFT_PATTERN = re.compile(r"\.checkpoint-(\d+)\.part")
# Files of these kinds are read when a run goes on.
READ_SUFFIXES = (".json", ".safetensors", ".pt")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors tells the system's error in words, not as an OSError.
FULL_IN_WORDS = re.compile(r"No space left on device|quota exceeded|File too large", re.IGNORECASE)


class CheckpointError(InputError):
    """A checkpoint that cannot be written or read."""


class DiskFullError(CheckpointError):
    """The disk (or a quota, or a limit on the size of files) has no room for what was to be written."""


# Finding


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Find the complete checkpoints of a run.

    Args:
        output_dir: Of the run.

    Returns:
        Their folders, oldest first.
    """
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if PATTERN.fullmatch(path.name) and (path / STATE_NAME).is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(name: str, output_dir: Path, check: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Find the checkpoint that `resume_from_checkpoint` names.

    Newer ones that are damaged are named in a warning and renamed to `checkpoint-N.damaged`.

    Args:
        name: A folder, or `last` for the newest one that is undamaged.
        output_dir: Of the run.
        check: Raises `ValueError` for a state that is none.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: Where none is left, or where the folder that was named is damaged.
    """
    if name != "last":
        path = Path(name)
        if not (path / STATE_NAME).is_file():
            raise CheckpointError(f"{path} is not a checkpoint: it has no {STATE_NAME}. Give a folder checkpoint-N.")
        verify(path, check)
        return path
    _finish_renaming(output_dir)
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        raise CheckpointError(
            f"There is no checkpoint in {output_dir} to resume from. Start the run anew, with smaller save_steps."
        )
    damage = []
    for path in reversed(checkpoints):
        try:
            verify(path, check)
        except CheckpointError as error:
            damage.append((path, str(error)))
            continue
        for damaged, words in damage:
            set_aside = damaged.with_name(damaged.name + ".damaged")
            shutil.rmtree(set_aside, ignore_errors=True)
            damaged.rename(set_aside)
            logger.warning("%s It was renamed to %s; the run goes on from %s.", words, set_aside.name, path.name)
        return path
    raise CheckpointError(
        f"No checkpoint in {output_dir} can be used: {' '.join(words for _, words in damage)} Check the disk, then "
        "start the run anew with --overwrite-output-dir."
    )


def _finish_renaming(output_dir: Path) -> None:
    """Where a kill came when a checkpoint was whole but not yet in its place, put it there."""
    newest = max((_step(path) for path in list_checkpoints(output_dir)), default=-1)
    drafts = [path for path in output_dir.glob(".checkpoint-*.part") if DRAFT_PATTERN.fullmatch(path.name)]
    for draft in drafts:
        if _step(draft) <= newest:
            continue
        try:
            verify(draft)
        except CheckpointError:
            continue
        draft.rename(output_dir / f"checkpoint-{_step(draft)}")


def _step(path: Path) -> int:
    return int(path.name.removeprefix(".").removesuffix(".part").split("-")[1])


def verify(checkpoint: Path, check: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Check that a checkpoint is what was written.

    Args:
        checkpoint: Its folder.
        check: Raises `ValueError` for a state that is none.

    Raises:
        CheckpointError: Where it is not.
    """
    state = read_state(checkpoint)
    try:
        if check is not None:
            check(state)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint} is damaged: {STATE_NAME} {error}.") from error
    listed = state["files"]
    for name, expected in listed.items():
        path = checkpoint / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["size"]:
            found = "is missing" if size is None else f"has {size:,} bytes of {expected['size']:,}"
            raise CheckpointError(f"{checkpoint} is damaged: {name} {found}.")
        if _hash(path) != expected["sha256"]:
            raise CheckpointError(f"{checkpoint} is damaged: the contents of {name} are not what was written.")
    for path in checkpoint.rglob("*"):
        name = path.relative_to(checkpoint).as_posix()
        if path.suffix in READ_SUFFIXES and name not in (*listed, STATE_NAME):
            raise CheckpointError(f"{checkpoint} is damaged: {STATE_NAME} does not say what {name} must be.")


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# Writing


def write_checkpoint(output_dir: Path, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Write a folder, add the trainer's state as JSON, and rename it to `checkpoint-{step}`.

    Args:
        output_dir: Of the run.
        step: How many steps were taken.
        write: Fills the folder that it is given.
        state: The trainer's state, JSON-able.

    Returns:
        The checkpoint's folder.

    Raises:
        DiskFullError: When the disk is full; what was half-written is removed, and earlier checkpoints remain.
    """
    final = output_dir / f"checkpoint-{step}"
    draft = output_dir / f".checkpoint-{step}.part"
    former = output_dir / f".checkpoint-{step}.former.part"
    for leaving in (draft, former):
        shutil.rmtree(leaving, ignore_errors=True)
    try:
        with explain_full_disk(output_dir, f"the checkpoint of step {step}"):
            draft.mkdir(parents=True)
            write(draft)
            files = sorted(path for path in draft.rglob("*") if path.is_file())
            sizes = {str(p.relative_to(draft)): {"size": p.stat().st_size, "sha256": _hash(p)} for p in files}
            _write_state(draft / STATE_NAME, state | {"files": sizes})
            _flush(draft)
            # One of that step may be there, where a run went on from an earlier one.
            if final.exists():
                final.rename(former)
            draft.rename(final)
    except BaseException:
        if former.exists() and not final.exists():
            former.rename(final)
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(former, ignore_errors=True)
    _sync(output_dir)
    return final


def _write_state(path: Path, state: dict[str, Any]) -> None:
    path.write_text(json.dumps(state | {"digest": _digest(state)}, indent=2), encoding="utf-8")


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def write_tensors(path: Path, contents: Any) -> None:
    """Write a torch file of a checkpoint.

    Args:
        path: The file.
        contents: Tensors and plain containers.

    Raises:
        OSError: As the system told it, which `torch.save` hides.
    """
    with path.open("wb") as file:
        watched = _Watched(file)
        try:
            torch.save(contents, watched)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise watched.error or error from error


class _Watched:
    """A file for writing that remembers why a write failed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def explain_full_disk(output_dir: Path, what: str) -> Iterator[None]:
    """Turn the errors of a full disk into one that says what to do; others pass.

    Args:
        output_dir: Of the run.
        what: What is written.

    Raises:
        DiskFullError: Instead of such an error.
    """
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        checkpoints = list_checkpoints(output_dir)
        last = (
            f"The last complete checkpoint is {checkpoints[-1]}" if checkpoints else "There is no earlier checkpoint"
        )
        raise DiskFullError(
            f"The disk of {output_dir} is full; {what} was not written. {last}. Free some space (or set "
            "save_total_limit), then resume with --resume-from-checkpoint."
        ) from error


def is_full_disk(error: BaseException) -> bool:
    """Whether there was no room for what was to be written."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    return FULL_IN_WORDS.search(str(error)) is not None


def _flush(folder: Path) -> None:
    """Have the system write the folder to the disk, so that the rename never outruns its contents."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_old_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Remove all checkpoints but the newest; drafts that a kill left behind and damaged ones go too.

    Args:
        output_dir: Of the run.
        limit: How many stay; None keeps all.
    """
    for leaving in (*output_dir.glob(".checkpoint-*.part"), *output_dir.glob("checkpoint-*.damaged")):
        shutil.rmtree(leaving, ignore_errors=True)
    if limit is not None:
        for path in list_checkpoints(output_dir)[:-limit]:
            # Renamed first: a kill in the middle of the removal must not leave half of a checkpoint under its name.
            going = path.with_name(f".{path.name}.going.part")
            try:
                path.rename(going)
            except OSError as error:  # no reason to end a run whose newest checkpoint is written
                logger.warning("%s could not be removed: %s", path, error)
            shutil.rmtree(going, ignore_errors=True)


# Reading


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the trainer's state of a checkpoint.

    Args:
        checkpoint: Its folder.

    Returns:
        The state; what it says of the checkpoint's files is there and of the right form.

    Raises:
        CheckpointError: Where it is not what was written.
    """
    path = checkpoint / STATE_NAME
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint} is damaged: {STATE_NAME} cannot be read ({error}).") from error
    if not isinstance(state, dict) or state.pop("digest", None) != _digest(state):
        raise CheckpointError(f"{checkpoint} is damaged: the contents of {STATE_NAME} are not what was written.")
    files = state.get("files")
    if not isinstance(files, dict) or not files or not all(map(_is_listed, files, files.values())):
        raise CheckpointError(f"{checkpoint} is damaged: {STATE_NAME} does not say what its files must be.")
    return state


def _is_listed(name: str, entry: Any) -> bool:
    """Whether an entry names a file of the checkpoint, with its size and hash."""
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(entry, dict) and isinstance(entry.get("size"), int) and "sha256" in entry


def read_tensors(path: Path) -> Any:
    """Read a torch file of a checkpoint; nothing but tensors and plain containers is accepted.

    Args:
        path: The file.

    Returns:
        What it holds, on the CPU.

    Raises:
        CheckpointError: Where it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"Cannot read {path}: {error}. Resume from another checkpoint.") from error
