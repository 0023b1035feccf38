"""Short runs take one thread where several would wait for each other, and leave the number as it was."""

import pytest
import torch

from hf_msae.cli import free_cores
from hf_msae.cli.free_cores import on_free_cores


@pytest.mark.parametrize("one_is_faster", [True, False])
def test_threads_are_those_of_free_cores_while_it_is_open(one_is_faster, monkeypatch, capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(free_cores, "_one_is_faster", lambda threads: one_is_faster)
        with on_free_cores():
            assert torch.get_num_threads() == (1 if one_is_faster else 2)
        assert torch.get_num_threads() == 2
        assert ("one thread, as 2 would wait" in capsys.readouterr().out) == one_is_faster
    finally:
        torch.set_num_threads(before)


def test_what_fails_in_between_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="in between"):
        _fail()
    assert torch.get_num_threads() == before


@on_free_cores()
def _fail() -> None:
    torch.set_num_threads(1)
    raise RuntimeError("in between")


def test_trying_both_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert free_cores._one_is_faster(2) in (True, False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
