"""A test that starts a process without the marker `slow` fails."""

import os
import re
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

@pytest.mark.peer
def test_peer(started):
    pass
"""


def test_every_way_of_starting_a_process_is_seen(tmp_path):
    (tmp_path / "test_tried.py").write_text(TRIED)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    peer\n")
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
    passed = {line.split("::")[1] for line in summary if line.startswith("PASSED")}
    assert passed == {"test_slow", "test_peer", "test_nothing"}
    assert told == {
        "test_runs",
        "test_forks",
        "test_spawns",
        "test_multiprocessing[spawn]",
        "test_multiprocessing[forkserver]",
        "test_fixture",
    }, done.stdout
    assert "for its own reason" in done.stdout


@pytest.mark.parametrize(
    ("expression", "imported"), [("not slow", {"fast", "both"}), ("", {"fast", "both", "slow", "listed", "inner"})]
)
def test_files_of_slow_tests_alone_are_not_imported_where_only_others_run(tmp_path, expression, imported):
    files = {
        "test_fast.py": "# pytestmark = pytest.mark.slow\n",
        "test_both.py": "@pytest.mark.slow\ndef test_slow():\n    pass\n",
        "test_slow.py": "pytestmark = pytest.mark.slow\n",
        "test_listed.py": "pytestmark = [\n    pytest.mark.slow,\n    pytest.mark.filterwarnings('ignore'),\n]\n",
        "below/test_inner.py": "pytestmark = pytest.mark.slow\n",
    }
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "conftest.py").write_text("print('imported: inner folder')\n")
    for name, text in files.items():
        word = Path(name).stem.removeprefix("test_")
        start = f"import pytest\nprint('imported: {word}')\n\ndef test_it():\n    pass\n\n"
        (tmp_path / name).write_text(start + text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "slow_tests", "-p", "no:cacheprovider", "-s", "-m", expression],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout
    found = re.findall(r"imported: (.+)", done.stdout)
    assert sorted(found) == sorted(imported | ({"inner folder"} if "inner" in imported else set()))
