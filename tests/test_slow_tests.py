"""A test that starts a process without the marker `slow` fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import HANG_SECONDS

pytestmark = pytest.mark.slow

TRIED = """
import multiprocessing, os, subprocess, sys
import pytest

def wait():
    pass

@pytest.fixture
def started():
    subprocess.run([sys.executable, "-c", ""])

def test_runs():
    subprocess.run([sys.executable, "-c", ""])

def test_forks():
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)

def test_spawns():
    os.waitpid(os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ), 0)

@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_multiprocessing(method):
    process = multiprocessing.get_context(method).Process(target=wait)
    process.start()
    process.join()

def test_fixture(started):
    pass

def test_nothing():
    pass

def test_fails():
    assert False, "for its own reason"

@pytest.mark.slow
def test_slow(started):
    pass
"""


def test_every_way_of_starting_a_process_is_seen(tmp_path):
    (tmp_path / "test_tried.py").write_text(TRIED)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "slow_tests", "-p", "no:cacheprovider", "-rA", "--tb=line"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "COLUMNS": "300"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    summary = [line for line in done.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "ERROR"))]
    told = {line.split("::")[1].split(" ")[0] for line in summary if "needs @pytest.mark.slow" in line}
    assert {line.split("::")[1] for line in summary if line.startswith("PASSED")} == {"test_slow", "test_nothing"}
    assert told == {
        "test_runs",
        "test_forks",
        "test_spawns",
        "test_multiprocessing[spawn]",
        "test_multiprocessing[forkserver]",
        "test_fixture",
    }, done.stdout
    assert "for its own reason" in done.stdout
