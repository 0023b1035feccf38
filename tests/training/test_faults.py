"""Real processes, hurt at random moments and resumed, leave what an undisturbed run leaves, bit for bit.

A few of each kind; `benchmarks/faults.py`, whose trials these are, runs as many as one likes.
"""

import importlib.util
import json
import signal
import sys
from pathlib import Path

import pytest

from hf_msae.training.checkpoints import list_checkpoints

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "faults.py"


@pytest.fixture(scope="module")
def faults():
    if not hasattr(signal, "SIGKILL") or sys.platform != "linux":
        pytest.skip("forks, signals and prlimit as Linux has them")
    spec = importlib.util.spec_from_file_location("faults", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench(faults, tmp_path_factory):
    return faults.Bench(faults.World(tmp_path_factory.mktemp("faults")), seed=3)


@pytest.mark.parametrize("fault", ["kill", "term", "full disk", "corrupt", "stream"])
def test_a_hurt_run_ends_as_if_nothing_had_been(bench, fault):
    trials = [bench.try_fault(fault) for _ in range(2)]
    assert sum(trial.faults for trial in trials) >= 1  # one that comes when all is done hurts nobody
    for trial in trials:
        assert (trial.finished, trial.same) == (True, True), trial.notes


def test_a_rank_that_dies_ends_the_other_and_the_run_resumes(bench):
    trial = bench.try_fault("rank")
    assert trial.same, trial.notes
    assert trial.faults == 1


def in_steps(bench, output: Path, step: int):
    """A process of the run that has taken so many steps."""
    (process,) = bench.start("grid", output, resume=False)
    log = output / "training_log.jsonl"
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, bench.said(output)
    return process


def test_sigterm_saves_the_step_that_it_is_in_and_tells_so(bench, tmp_path):
    output = tmp_path / "run"
    process = in_steps(bench, output, 5)
    process.send(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    (line,) = [line for line in bench.said(output).splitlines() if "Stopped by SIGTERM" in line]
    step = int(line.split("after step ")[1].split()[0])
    assert list_checkpoints(output)[-1].name == f"checkpoint-{step}"
    logged = [json.loads(text)["step"] for text in (output / "training_log.jsonl").read_text().splitlines()]
    assert max(logged) == step  # a line for every step: it took no other after the signal was seen


def test_a_full_disk_in_mid_run_costs_checkpoints_and_not_the_run(bench, faults, tmp_path):
    import resource

    output, unlimited = tmp_path / "run", resource.RLIM_INFINITY
    whole, _ = bench.reference("grid")
    process = in_steps(bench, output, 6)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (3000, unlimited))
    while "next checkpoint is tried at its time" not in bench.said(output):
        assert process.poll() is None, bench.said(output)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
    assert process.wait() == 0, bench.said(output)
    assert faults.differences(whole, output) == []

    def steps(folder: Path) -> list[int]:
        return [json.loads(line)["step"] for line in (folder / "training_log.jsonl").read_text().splitlines()]

    assert steps(output) == steps(whole)  # lines for which there was no room came later
