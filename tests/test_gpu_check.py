"""`make gpu`: each check is told, whatever happens in another; and on the CPU the checks find it equal to itself."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from pretended_cuda import DEVICE, pretended_cuda

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_check")


@pytest.fixture
def checks(harness):
    return importlib.import_module("gpu_checks")


def test_it_goes_on_after_whatever_happens(harness, capsys) -> None:
    def fails(place):
        """Something holds."""
        raise AssertionError("it does not\nand more")

    def breaks(place):
        """Something runs."""
        return {}["nothing"]

    def skips(place):
        """Something needs a GPU."""
        place.needs_gpu()

    def fills_memory(place):
        """Something fits."""
        raise torch.OutOfMemoryError("no room")

    def passes(place):
        """Something is right."""
        return {"number": 3}

    tried = {"fails": fails, "breaks": breaks, "skips": skips, "fills": fills_memory, "passes": passes}
    outcomes = harness.run_checks(tried, harness.Place(CPU))
    assert [one.status for one in outcomes] == ["FAIL", "FAIL", "SKIP", "SKIP", "PASS"]
    assert [one.reason for one in outcomes] == [
        "it does not",
        "'nothing'",
        "needs a GPU",
        "out of memory: no room",
        "",
    ]
    assert outcomes[-1].facts == {"number": 3}
    assert "Traceback" in outcomes[0].facts["traceback"]
    assert capsys.readouterr().out.count("\n") == 5
    (late,) = harness.run_checks({"passes": passes}, harness.Place(CPU), seconds=0)
    assert (late.status, late.reason) == ("SKIP", "no time is left")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence(harness, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert harness.main() == 2
    assert capsys.readouterr().out.startswith("There is no GPU that torch sees")


def test_the_checks_find_the_cpu_equal_to_itself(harness, checks, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(checks, "ACTIVATIONS", ("batch_topk",))
    file = tmp_path / "found.json"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "gpu_check.py",
            "--device",
            "cpu",
            "--small",
            "--json",
            str(file),
            "--only",
            "compiler",
            "kernels",
            "steps",
            "bits",
            "syncs",
            "cards",
        ],
    )
    assert harness.main() == 0, capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["where"]["device"] == "cpu"
    assert {one["name"]: one["status"] for one in found["checks"]} == {
        "compiler": "SKIP",
        "kernels": "SKIP",
        "steps": "PASS",
        "bits": "PASS",
        "syncs": "SKIP",
        "cards": "SKIP",
    }


@pytest.mark.slow
def test_graphs_are_checked_where_they_can_be_captured(harness, checks, monkeypatch) -> None:
    """On a pretended GPU, whose captures pass, and fail where a number is read in between."""
    monkeypatch.setattr("hf_msae.modeling.devices.runs_kernels", lambda device: False)
    with pretended_cuda():
        outcome = harness.run_check("graphs", checks.graphs, harness.Place(DEVICE, small=True), 600)
        assert outcome.status == "PASS", outcome.reason
        assert len(outcome.facts) == 4
        backward = torch.Tensor.backward
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (backward(loss), loss.item()))
        outcome = harness.run_check("graphs", checks.graphs, harness.Place(DEVICE, small=True), 600)
        assert (outcome.status, outcome.reason) == ("FAIL", "a step could not be captured; the reason is above")


def test_a_step_that_is_not_the_cpus_fails(harness, checks, monkeypatch) -> None:
    make = checks.make_learner
    calls = []

    def twisted(*args, **options):
        learner = make(*args, **options)
        calls.append(learner)
        if len(calls) % 2:
            learner.sae.config.k += 1
        return learner

    monkeypatch.setattr(checks, "ACTIVATIONS", ("batch_topk",))
    monkeypatch.setattr(checks, "make_learner", twisted)
    outcome = harness.run_check("steps", checks.steps, harness.Place(CPU, small=True), left=100)
    assert outcome.status == "FAIL"
    assert "batch_topk, fp32, 0% dead" in outcome.reason


def test_bits_that_differ_are_named(checks) -> None:
    x = torch.ones(3)
    checks.check_equal({"a": x, "b": x}, {"a": x.clone(), "b": x.clone()})
    with pytest.raises(AssertionError, match=r"^b differ"):
        checks.check_equal({"a": x, "b": x + 1e-7}, {"a": x, "b": x})
