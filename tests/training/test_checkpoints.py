"""Checkpoints are whole or absent."""

import errno

import pytest
import torch

from hf_msae.training import CheckpointError
from hf_msae.training.checkpoints import (
    find_checkpoint,
    list_checkpoints,
    read_state,
    read_tensors,
    remove_old_checkpoints,
    write_checkpoint,
)


def write_one(output_dir, step):
    return write_checkpoint(output_dir, step, lambda draft: (draft / "data").write_text(str(step)), {"step": step})


def test_writes_lists_in_order_and_rotates(tmp_path):
    for step in (5, 100, 20):
        write_one(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-20", "checkpoint-100"]
    assert read_state(find_checkpoint("last", tmp_path)) == {"step": 100}
    remove_old_checkpoints(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-100"]


def test_a_failed_write_leaves_nothing_and_keeps_the_last(tmp_path):
    write_one(tmp_path, 1)

    def fail(draft):
        (draft / "half").write_text("x")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_checkpoint(tmp_path, 2, fail, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_full_disk_is_explained(tmp_path):
    write_one(tmp_path, 1)

    def fill(draft):
        with open("/dev/full", "w") as file:  # the kernel's own "No space left on device"
            file.write("x" * 100_000)

    with pytest.raises(CheckpointError, match=r"disk of .* is full.*step 2.*checkpoint-1.*resume") as caught:
        write_checkpoint(tmp_path, 2, fill, {"step": 2})
    assert caught.value.__cause__.errno == errno.ENOSPC


def test_drafts_are_not_checkpoints_and_are_cleared(tmp_path):
    draft = tmp_path / ".checkpoint-7.part"
    draft.mkdir()
    (draft / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-8").mkdir()  # no state: not complete
    assert list_checkpoints(tmp_path) == []
    remove_old_checkpoints(tmp_path, None)
    assert not draft.exists()


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint("last", tmp_path)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        find_checkpoint(str(tmp_path), tmp_path)


def test_pickles_are_refused(tmp_path):
    torch.save({"tensor": torch.ones(2), "code": write_one}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="Cannot read"):
        read_tensors(tmp_path / "bad.pt")
