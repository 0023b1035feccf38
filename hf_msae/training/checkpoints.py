"""Checkpoints that are whole or absent.

A checkpoint is written into a folder beside its place and renamed into it, so a kill at any moment leaves the last
complete one. It holds what a reader can load as an SAE (`config.json`, `model.safetensors`, the modeling files) and
what only a resumed run needs: torch state read with `weights_only=True`, and JSON.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

STATE_NAME = "trainer_state.json"
PATTERN = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read."""


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if PATTERN.fullmatch(path.name) and (path / STATE_NAME).is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(name: str, output_dir: Path) -> Path:
    """The checkpoint that `resume_from_checkpoint` names: a folder, or `last`."""
    if name != "last":
        path = Path(name)
        if not (path / STATE_NAME).is_file():
            raise CheckpointError(f"{path} is not a checkpoint: it has no {STATE_NAME}. Give a folder checkpoint-N.")
        return path
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        raise CheckpointError(
            f"There is no checkpoint in {output_dir} to resume from. Start the run anew, with smaller save_steps."
        )
    return checkpoints[-1]


def write_checkpoint(output_dir: Path, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Have `write` fill a new folder, add the trainer's state as JSON, and rename it to `checkpoint-{step}`.

    Raises `CheckpointError` when the disk is full; what was half-written is removed, and earlier checkpoints remain.
    """
    final = output_dir / f"checkpoint-{step}"
    draft = output_dir / f".checkpoint-{step}.part"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with explain_full_disk(output_dir, f"the checkpoint of step {step}"):
            draft.mkdir(parents=True)
            write(draft)
            (draft / STATE_NAME).write_text(json.dumps(state, indent=2))
            _flush(draft)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    return final


@contextmanager
def explain_full_disk(output_dir: Path, what: str) -> Iterator[None]:
    """Turn the errors of a full disk into a `CheckpointError` that says what to do; others pass."""
    try:
        yield
    except Exception as error:
        # safetensors and torch report the system's error in words, not as an OSError.
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and "No space left on device" not in str(error):
            raise
        checkpoints = list_checkpoints(output_dir)
        last = (
            f"The last complete checkpoint is {checkpoints[-1]}" if checkpoints else "There is no earlier checkpoint"
        )
        raise CheckpointError(
            f"The disk of {output_dir} is full; {what} was not written. {last}. Free some space (or set "
            "save_total_limit), then resume with --resume-from-checkpoint."
        ) from error


def _flush(folder: Path) -> None:
    """Have the system write the folder's files to the disk, so that the rename never outruns their contents."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def remove_old_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Keep the newest `limit` checkpoints, all if None; drafts that a kill left behind go too."""
    for draft in output_dir.glob(".checkpoint-*.part"):
        shutil.rmtree(draft, ignore_errors=True)
    if limit is not None:
        for path in list_checkpoints(output_dir)[:-limit]:
            shutil.rmtree(path)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state of a checkpoint."""
    try:
        return json.loads((checkpoint / STATE_NAME).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"Cannot read {checkpoint / STATE_NAME}: {error}. Resume from another one.") from error


def read_tensors(path: Path) -> Any:
    """A torch file of a checkpoint; nothing but tensors and plain containers is accepted."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"Cannot read {path}: {error}. Resume from another checkpoint.") from error
