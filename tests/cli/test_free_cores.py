"""Commands take one thread where several would wait for each other, unless they are told how many to take."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from patience import HANG_SECONDS, until

from hf_msae.cli import free_cores
from hf_msae.cli.free_cores import SAID_BY, on_free_cores, take_free_cores


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of which nobody has said that there are to be two."""
    for name in SAID_BY:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def machine(monkeypatch, free: float, one_is_faster: bool = False) -> None:
    monkeypatch.setattr(free_cores, "_free_cores", lambda: free)
    monkeypatch.setattr(free_cores, "_one_is_faster", lambda threads: one_is_faster)


@pytest.mark.parametrize(
    ("free", "one_is_faster", "threads"),
    [
        (2.0, False, 2),
        (1.8, False, 2),
        (1.7, False, 1),
        (0.9, False, 1),
        (0.0, False, 1),
        (7.5, False, 2),
        (2.0, True, 1),
    ],
)
def test_threads_are_those_of_free_cores_while_it_is_open(free, one_is_faster, threads, monkeypatch, capsys):
    machine(monkeypatch, free, one_is_faster)
    with on_free_cores():
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2
    said = capsys.readouterr()
    assert ("1 of 2 threads, which would wait" in said.err) == (threads == 1)
    assert said.out == ""  # where a command prints JSON


@pytest.mark.parametrize("name", SAID_BY)
def test_a_number_that_was_asked_for_is_taken(name, monkeypatch):
    machine(monkeypatch, free=0.0)
    monkeypatch.setenv(name, "2")
    take_free_cores()
    assert torch.get_num_threads() == 2


@pytest.mark.slow
def test_a_core_that_is_used_is_not_free():
    """A process that computes without end takes most of one, whoever else does."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            until(lambda: 0 <= free_cores._free_cores() <= there - 0.5)
        finally:
            process.kill()


def test_what_fails_in_between_leaves_the_threads_as_they_were():
    with pytest.raises(RuntimeError, match="in between"):
        _fail()
    assert torch.get_num_threads() == 2


@on_free_cores()
def _fail() -> None:
    torch.set_num_threads(1)
    raise RuntimeError("in between")


def test_trying_both_leaves_the_threads_as_they_were():
    assert free_cores._one_is_faster(2) in (True, False)
    assert torch.get_num_threads() == 2


CHOOSING = """
from hf_msae.cli import sources
sources.take_free_cores = lambda: print("decides")
sources.choose_device(use_cpu=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_only_a_process_that_is_alone_decides_by_itself(processes, tmp_path):
    """Sums of others would round in another way, and copies of the weights would part."""
    program = tmp_path / "choosing.py"
    program.write_text(CHOOSING, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
    command = [sys.executable, *launch, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == (["decides"] if processes == 1 else [])
