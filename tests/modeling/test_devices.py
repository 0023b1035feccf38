"""Whether Triton's kernels are taken: tried once a device, compared with torch, and done without where they fail."""

import logging
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from hf_msae.modeling import devices
from hf_msae.modeling.devices import constants, has_kernels, runs_kernels, sent
from patience import HANG_SECONDS
from pretended_cuda import DEVICE, pretended_cuda

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (`pip install triton`)")
# Triton on a machine without a GPU fails as it does without a compiler: at the first launch.
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton may launch")


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is told; transformers' own handler keeps messages from pytest."""
    monkeypatch.setattr(devices, "logger", logging.getLogger("test_devices"))
    runs_kernels.cache_clear()
    yield caplog
    runs_kernels.cache_clear()


def test_numbers_arrive_without_waiting() -> None:
    with pretended_cuda() as gpu:
        moved = sent(torch.ones(2), DEVICE)
        assert gpu.syncs == []
        assert (moved.device, moved.tolist()) == (DEVICE, [1, 1])


def test_constants_arrive_once() -> None:
    with pretended_cuda() as gpu:
        like = torch.zeros(3, dtype=torch.int64).pin_memory().to(DEVICE, non_blocking=True)
        with torch.inference_mode():
            constants([1, 2], like)
            others = constants([1, 2], like.double())
        gpu.clear()
        found = constants([1, 2], like)
        assert gpu.syncs == []
        assert (found.device, found.dtype, found.tolist()) == (DEVICE, torch.int64, [1, 2])
        assert others.dtype == torch.float64
        weights = torch.ones(2, device=DEVICE, dtype=torch.float64, requires_grad=True)
        assert not others.is_inference()
        (weights * others).sum().backward()  # for which what is made without gradients would be of no use
    assert constants([0.5], torch.zeros(1)).tolist() == [0.5]


@needs_triton
@no_gpu
def test_where_the_first_launch_fails_torch_is_taken_and_it_is_told_once(warnings) -> None:
    with pretended_cuda():
        table = torch.ones(2, 4, device=DEVICE)
        assert [has_kernels(table) for _ in range(3)] == [False] * 3
    (record,) = warnings.records
    message = record.getMessage()
    assert "Triton's kernels do not work on cuda:0" in message
    assert "apt-get install gcc python3-dev" in message
    assert "0 active drivers" in message  # Triton's own words


def test_kernels_that_compute_something_else_are_not_taken(warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_ops = pytest.importorskip("hf_msae.modeling.triton_ops")
    monkeypatch.setattr("hf_msae.modeling.triton_rows.check_kernels", lambda device: None)
    right = {
        "segment_sum": lambda table, rows, weights, offsets: torch.nn.functional.embedding_bag(
            rows, table, offsets, mode="sum", per_sample_weights=weights
        ),
        "segment_dot": lambda grads, table, rows, bags: (grads[bags] * table[rows]).sum(1),
        "compact_above": lambda pre, threshold: triton_ops.Compacted(
            (pre > threshold).flatten().nonzero().squeeze(1), pre[pre > threshold], (pre > threshold).sum()
        ),
        "compact_largest": lambda places, values, count: [
            part[values.sort(descending=True, stable=True).indices[:count].sort().values] for part in (places, values)
        ],
    }
    wrong = {
        "segment_sum": lambda *inputs: right["segment_sum"](*inputs) * 1.01,
        "segment_dot": lambda *inputs: right["segment_dot"](*inputs)[:-1],
        "compact_above": lambda *inputs: right["compact_above"](*inputs)._replace(values=torch.zeros(3)),
        "compact_largest": lambda places, values, count: (places[:count], values[:count]),
    }
    for broken in (None, *wrong):
        for name, function in right.items():
            monkeypatch.setattr(triton_ops, name, wrong[name] if name == broken else function)
        runs_kernels.cache_clear()
        with pretended_cuda():
            assert runs_kernels(DEVICE) == (broken is None)
        if broken is not None:
            assert f"The result of {broken}" in warnings.records[-1].getMessage()
    assert len(warnings.records) == len(wrong)


def test_tables_that_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "runs_kernels", lambda device: True)
    assert not has_kernels(torch.ones(2, 2))
    with pretended_cuda():
        assert has_kernels(torch.ones(2, 2, device=DEVICE))
        assert not has_kernels(torch.ones(2, 2, device=DEVICE).double())


def test_without_triton_nothing_is_told(warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "is_triton_available", lambda: False)
    assert not runs_kernels(DEVICE)
    assert not warnings.records


@pytest.mark.slow
@needs_triton
def test_the_kernels_agree_with_torch_in_the_interpreter() -> None:
    code = (
        "import torch; from hf_msae.modeling import triton_ops, devices; "
        "assert devices.runs_kernels(torch.device('cpu')); "
        "triton_ops.compact_above = lambda *args: triton_ops.Compacted(torch.zeros(1), torch.zeros(1), 0); "
        "devices.runs_kernels.cache_clear(); assert not devices.runs_kernels(torch.device('cpu'))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert run.returncode == 0, run.stderr
    assert "The result of compact_above" in run.stderr
