"""Checkpoints are whole or absent."""

import errno
import resource

import pytest
import torch
from safetensors.torch import save_file

from hf_msae.training import CheckpointError
from hf_msae.training.checkpoints import (
    DiskFullError,
    explain_full_disk,
    find_checkpoint,
    list_checkpoints,
    read_state,
    read_tensors,
    remove_old_checkpoints,
    write_checkpoint,
    write_tensors,
)


def write_one(output_dir, step):
    return write_checkpoint(output_dir, step, lambda draft: (draft / "data").write_text(str(step)), {"step": step})


def test_writes_lists_in_order_and_rotates(tmp_path):
    for step in (5, 100, 20):
        write_one(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-20", "checkpoint-100"]
    assert read_state(find_checkpoint("last", tmp_path))["step"] == 100
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
        with open("/dev/full", "w", encoding="utf-8") as file:  # the kernel's own "No space left on device"
            file.write("x" * 100_000)

    with pytest.raises(CheckpointError, match=r"disk of .* is full.*step 2.*checkpoint-1.*resume") as caught:
        write_checkpoint(tmp_path, 2, fill, {"step": 2})
    assert caught.value.__cause__.errno == errno.ENOSPC


@pytest.mark.parametrize("limit", [10, 5_000])
def test_a_full_disk_is_told_from_other_errors_whoever_writes(tmp_path, limit):
    """A limit on the size of files, as the kernel enforces it, for torch's, safetensors' and Python's own writing."""
    contents = {"a": torch.zeros(100_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        for write in (
            lambda: write_tensors(tmp_path / "a.pt", contents),
            lambda: save_file(contents, tmp_path / "a.safetensors"),
            lambda: (tmp_path / "a.txt").write_text("a" * 100_000),
        ):
            with pytest.raises(DiskFullError, match="a thing was not written"), explain_full_disk(tmp_path, "a thing"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(PermissionError), explain_full_disk(tmp_path, "a thing"):
        raise PermissionError(errno.EACCES, "Permission denied")


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "truncated", "other bits"])
@pytest.mark.parametrize("name", ["data", "trainer_state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, name, how):
    for step in (1, 2, 3):
        write_one(tmp_path, step)
    damage(tmp_path / "checkpoint-3" / name, how)
    damage(tmp_path / "checkpoint-2" / "data", "truncated")
    assert find_checkpoint("last", tmp_path).name == "checkpoint-1"
    assert "checkpoint-2 is damaged: data has 0 bytes of 1. It was renamed" in caplog.text
    if (name, how) != ("trainer_state.json", "missing"):  # without a state it is none
        assert "checkpoint-3 is damaged" in caplog.text
        assert (tmp_path / "checkpoint-3.damaged").is_dir()
    write_one(tmp_path, 4)
    remove_old_checkpoints(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4"]
    assert not list(tmp_path.glob("*.damaged"))


def test_where_no_checkpoint_is_good_all_are_named(tmp_path):
    for step in (1, 2):
        write_one(tmp_path, step)
        damage(tmp_path / f"checkpoint-{step}" / "data", "other bits")
    with pytest.raises(CheckpointError, match=r"No checkpoint in .*checkpoint-2 is damaged.*checkpoint-1 is damaged"):
        find_checkpoint("last", tmp_path)
    with pytest.raises(CheckpointError, match="the contents of data are not what was written"):
        find_checkpoint(str(tmp_path / "checkpoint-1"), tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]  # left as they are


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
