"""A fault at every file operation of a save, in turn: the newest complete checkpoint is found afterwards."""

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_msae.training.checkpoints import (
    STATE_NAME,
    find_checkpoint,
    list_checkpoints,
    read_state,
    read_tensors,
    remove_old_checkpoints,
    write_checkpoint,
    write_tensors,
)

pytestmark = pytest.mark.slow

# What Python tells its audit hooks of before it is done; a hook that raises prevents it.
OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Faults:
    """Fails at the n-th file operation under a folder, once; a hook cannot be removed, so it is switched off."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.count = self.at = 0
        self.kill = False
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event == "open":
            counts = isinstance(arguments[0], str) and bool((arguments[2] or 0) & WRITING)
        else:
            counts = event in OPERATIONS
        # Removal goes from folder to folder with descriptors and bare names; all of it is under the folder.
        if not counts:
            return
        self.count += 1
        if self.count == self.at:
            if self.kill:
                os._exit(9)
            raise OSError(errno.EIO, f"injected at {event}")


@pytest.fixture(scope="module")
def faults():
    return Faults()


def save(output_dir: Path, step: int, value: float) -> None:
    """A checkpoint of two SAEs, written in all the ways in which files are written here."""

    def write(draft: Path) -> None:
        for name in ("one", "two"):
            (draft / name).mkdir()
            (draft / name / "config.json").write_text(str(value))
            save_file({"x": torch.full((3,), value)}, draft / name / "model.safetensors")
            write_tensors(draft / name / "learner.pt", {"x": torch.full((3,), value)})

    write_checkpoint(output_dir, step, write, {"step": step, "value": value})
    remove_old_checkpoints(output_dir, 2)


def value_of(checkpoint: Path) -> float:
    """The value that all files of a checkpoint hold."""
    found = {read_state(checkpoint)["value"]}
    for name in ("one", "two"):
        found.add(float((checkpoint / name / "config.json").read_text()))
        found |= set(load_file(checkpoint / name / "model.safetensors")["x"].tolist())
        found |= set(read_tensors(checkpoint / name / "learner.pt")["x"].tolist())
    assert len(found) == 1
    return found.pop()


def attempt(faults: Faults, folder: Path, step: int, at: int, kill: bool) -> bool:
    """Save with a fault at an operation; whether it struck."""
    faults.folder, faults.count, faults.at, faults.kill = folder, 0, at, kill
    try:
        if not kill:
            save(folder, step, 3.0)
            return faults.count >= at
        child = os.fork()
        if child == 0:
            save(folder, step, 3.0)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    except OSError:
        return True
    finally:
        faults.folder = None


@pytest.mark.parametrize("kill", [False, True], ids=["error", "kill"])
@pytest.mark.parametrize("step", [12, 8, 4], ids=["new", "again", "older again"])
def test_the_newest_complete_checkpoint_is_found_after_any_fault(tmp_path, faults, step, kill):
    before = tmp_path / "before"
    for number, value in ((2, 0.0), (4, 1.0), (8, 2.0)):
        save(before, number, value)
    at, struck = 0, True
    while struck:
        at += 1
        folder = shutil.copytree(before, tmp_path / str(at))
        struck = attempt(faults, folder, step, at, kill)
        found = find_checkpoint("last", folder)
        allowed = {(8, 2.0), (step, 3.0)} if step >= 8 else {(8, 2.0)}
        assert (int(found.name.split("-")[1]), value_of(found)) in allowed, at
        for path in list_checkpoints(folder):
            value_of(path)  # whatever has the name of a checkpoint is one
        if not struck:
            assert value_of(folder / f"checkpoint-{step}") == 3.0
        save(folder, 16, 4.0)
        assert value_of(find_checkpoint("last", folder)) == 4.0
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            path.name for path in list_checkpoints(folder)
        ), "nothing is left behind"
        shutil.rmtree(folder)
    assert at > 15  # so many operations there are at least


def test_a_whole_draft_is_put_in_its_place_and_a_half_one_is_not(tmp_path):
    save(tmp_path, 4, 1.0)
    save(tmp_path, 8, 2.0)
    (tmp_path / "checkpoint-8").rename(tmp_path / ".checkpoint-8.part")
    assert value_of(find_checkpoint("last", tmp_path)) == 2.0
    (tmp_path / "checkpoint-8").rename(tmp_path / ".checkpoint-8.part")
    (tmp_path / ".checkpoint-8.part" / "one" / "config.json").write_text("9.9")
    assert value_of(find_checkpoint("last", tmp_path)) == 1.0
    (tmp_path / ".checkpoint-8.part" / STATE_NAME).unlink()
    assert value_of(find_checkpoint("last", tmp_path)) == 1.0
