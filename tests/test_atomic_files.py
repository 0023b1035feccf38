"""What is written is whole or absent, whatever happens on the way."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from hf_msae.atomic_files import atomic_file, atomic_folder, remove_drafts
from hf_msae.errors import HfMsaeError


class TestAFile:
    def test_what_was_there_stays_until_the_new_one_is_whole(self, tmp_path: Path):
        path = tmp_path / "deep" / "file.json"
        with atomic_file(path) as draft:
            draft.write_text("first")
            assert not path.exists()
        with suppress(RuntimeError), atomic_file(path) as draft:
            draft.write_text("sec")
            raise RuntimeError("disk full")
        assert path.read_text() == "first"
        with atomic_file(path) as draft:
            draft.write_text("second")
            assert path.read_text() == "first"
        assert path.read_text() == "second"
        assert list(path.parent.iterdir()) == [path]

    def test_two_writers_do_not_meet(self, tmp_path: Path):
        with atomic_file(tmp_path / "x") as one, atomic_file(tmp_path / "x") as other:
            one.write_text("one")
            other.write_text("other")
        assert (tmp_path / "x").read_text() == "one"  # whose block ended last

    def test_others_may_read_it_as_any_new_file(self, tmp_path: Path):
        (tmp_path / "plain").write_text("")
        with atomic_file(tmp_path / "atomic") as draft:
            draft.write_text("")
        with atomic_folder(tmp_path / "folder"):
            pass
        (tmp_path / "plain folder").mkdir()
        for atomic, plain in (("atomic", "plain"), ("folder", "plain folder")):
            assert os.stat(tmp_path / atomic).st_mode == os.stat(tmp_path / plain).st_mode

    def test_what_a_kill_leaves_is_hidden_and_can_be_removed(self, tmp_path: Path):
        with atomic_file(tmp_path / "x.json") as draft:
            draft.write_text("whole")
        draft.write_text("as a killed process leaves it")
        assert list(tmp_path.glob("[!.]*")) == [tmp_path / "x.json"]
        remove_drafts(tmp_path)
        assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


class TestAFolder:
    def test_all_or_nothing(self, tmp_path):
        with suppress(RuntimeError), atomic_folder(tmp_path / "a" / "out") as folder:
            (folder / "half").touch()
            raise RuntimeError("disk full")
        assert list((tmp_path / "a").iterdir()) == []
        with atomic_folder(tmp_path / "a" / "out") as folder:
            (folder / "whole").touch()
            assert not (tmp_path / "a" / "out").exists()
        assert [path.name for path in (tmp_path / "a").rglob("*")] == ["out", "whole"]

    def test_an_empty_folder_is_taken(self, tmp_path):
        with atomic_folder(tmp_path) as folder:
            (folder / "x").touch()
        assert [path.name for path in tmp_path.iterdir()] == ["x"]

    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_what_is_there_stays(self, tmp_path, kind):
        target = tmp_path / "out"
        if kind == "file":
            target.write_text("mine")
        else:
            target.mkdir()
            (target / "mine").touch()
        with (
            pytest.raises(FileExistsError, match="exists and is not an empty folder") as raised,
            atomic_folder(target),
        ):
            pytest.fail("must not be entered")
        assert isinstance(raised.value, HfMsaeError)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
