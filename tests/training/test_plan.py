"""The plan's numbers against shapes, a real run's peak and files, and what several processes then do."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from patience import HANG_SECONDS
from runs_of_processes import launch
from safetensors.torch import load_file, save_file
from small_runs import make_sae

from hf_msae.training import plan

pytestmark = pytest.mark.slow

# How far the expected peak may be from the measured one, as a share of it.
TOLERANCE = 0.2


def test_counts_follow_from_shapes(trainer):
    plan = trainer([make_sae(), make_sae(num_latents=128, prefix_sizes=[8, 128], k=2)]).plan()
    parameters = sum(2 * 16 * latents + latents + 16 for latents in (64, 128))
    assert plan.kept["gradients"] == 4 * parameters
    assert plan.kept["optimizer"] == 8 * parameters
    assert plan.kept["counters"] == 8 * (64 + 128)
    assert plan.kept["activation buffers"] == 2 * (300 + 32) * (16 * 4 + 8)
    assert (plan.steps, plan.tokens) == (12, 12 * 64)
    assert plan.peak == plan.before + sum(plan.kept.values()) + max(plan.passing.values())
    assert plan.warnings() == []


def test_what_a_graph_holds_is_not_given_back(trainer):
    run = trainer()
    plain = run.plan()
    run.run.args = replace(run.run.args, cuda_graphs=True)
    plan = run.plan()
    assert plan.kept == plain.kept | {"graphs of steps": plain.passing["a step"]}
    assert plan.passing == {name: size for name, size in plain.passing.items() if name != "a step"}


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="what is mapped is read from /proc")
@pytest.mark.parametrize("name", ["model.safetensors", "blobs/0a1b"])
def test_weights_count_before_they_are_read(tmp_path, name):
    """They are mapped from their file, and are in memory once somebody looks at them."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    save_file({"weights": torch.ones(1 << 24)}, path)
    cpu, size = torch.device("cpu"), 1 << 26
    before = plan._held(cpu)
    weights = load_file(path)["weights"]
    loaded = plan._held(cpu)
    assert weights.sum() == 1 << 24
    assert loaded - before == pytest.approx(size, rel=0.1)
    assert plan._held(cpu) - before == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_a_plan_counts_the_tokens_that_the_run_takes(trainer, accumulation):
    run = trainer(gradient_accumulation_steps=accumulation, max_steps=3)
    plan = run.plan()
    run.train()
    assert (plan.steps, plan.tokens) == (run.state.global_step, run.state.num_input_tokens_seen)
    assert plan.tokens == 3 * 64 * accumulation


def test_a_plan_of_two_processes_counts_what_they_then_do(tmp_path, lm, tokenizer, texts):
    """Two processes of three micro-batches each: steps, tokens and rates of `--dry-run` are those of the log."""
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    args = {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 32, "gradient_accumulation_steps": 3}
    args |= {"max_tokens": 1000, "context_length": 32, "block_tokens": 300, "ce_tokens": 0}
    args |= {"eval_tokens": 200, "calibration_tokens": 400, "logging_steps": 1, "save_steps": 0, "lm_batch_size": 4}
    args |= {"use_cpu": True, "disable_tqdm": True}
    sae = {"hidden_size": 16, "num_latents": 64, "prefix_sizes": [8, 64], "k": 4, "site": "layers.0"}
    told_at = tmp_path / "told.json"
    dry_run = {"dry_run": str(told_at), "model": str(tmp_path / "lm"), "texts": texts}
    launch(2, dry_run | {"saes": {"sae": sae, "other": sae}, "args": args})
    told = json.loads(told_at.read_text())
    log = [json.loads(line) for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines()]
    steps = 1000 // 192
    assert (told["steps"], told["tokens_per_step"]) == (steps, 192)
    assert told["steps"] == len(log) // 2 == log[-1]["step"]
    assert told["tokens"] == log[-1]["tokens"] == 192 * steps
    # The clock ticks once in a step, of the probe and of the run, so a rate is the tokens of a step.
    assert told["rate"] == pytest.approx(192)
    assert all(line["tokens_per_second"] == pytest.approx(192) for line in log)
    # And once in a pass of the language model, in which each process reads four windows of its own.
    assert 2 * 4 * 16 < told["language_model"] <= 2 * 4 * 32


def test_the_size_of_checkpoints_and_of_the_disk_is_that_of_the_files(trainer, tmp_path):
    run = trainer(make_sae(num_latents=4096, prefix_sizes=[8, 4096]))
    plan = run.plan()
    assert not (tmp_path / "run").exists()
    run.train()

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert plan.checkpoint == pytest.approx(size(tmp_path / "run" / "checkpoint-12"), rel=0.1)
    assert size(tmp_path / "run") < plan.disk_needed < 1.8 * size(tmp_path / "run")  # one more, for a while


def test_what_does_not_fit_is_said_before_the_run(trainer, caplog):
    run = trainer(
        make_sae(num_latents=4096, prefix_sizes=[8, 4096]),
        block_tokens=10**13,
        max_steps=10**12,
        save_total_limit=None,
        save_steps=1,
    )
    (memory, disk) = run.plan().warnings()
    # And what this process holds already.
    assert re.match(r"The run is expected to need 14400\d\d\.\d GB", memory)
    assert "Lower block_tokens" in memory
    assert "Lower save_total_limit" in disk
    run.plan().warn()
    assert memory in caplog.text


# Trains in a process that does nothing else, and prints the expected and the measured peak.
PEAK = """
import json, sys
from itertools import pairwise
from pathlib import Path
from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.worlds.stories import StoryWorld, load_story_lm

model, tokenizer = load_story_lm()
sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=128, num_latents=8192, k=16, site="layers.2"))
args = SAETrainingArguments(
    output_dir=sys.argv[1], max_steps=4, per_device_train_batch_size=1024, block_tokens=30_000, lm_batch_size=4,
    eval_tokens=2000, calibration_tokens=2000, ce_tokens=1000, save_steps=2, disable_tqdm=True, use_cpu=True,
)
trainer = SAETrainer(model, sae, args, StoryWorld(seed=0).documents(600), processing_class=tokenizer)
plan = trainer.plan()
trainer.train()
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
print(json.dumps({"expected": plan.peak, "measured": peak, "before": plan.before}))
"""


def test_the_expected_peak_is_that_of_a_real_run(tmp_path):
    if not Path("/proc/self/status").is_file():
        pytest.skip("reads the peak from /proc, which only Linux has")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "run")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert sizes["measured"] > sizes["before"] + 50e6  # the run itself is seen
    assert sizes["expected"] == pytest.approx(sizes["measured"], rel=TOLERANCE)


def test_a_probe_tells_two_rates(trainer, tmp_path):
    rates = trainer().probe()
    assert rates.language_model > 0
    assert rates.tokens_per_second < min(rates.language_model, rates.steps)
    assert rates.tokens_per_second == pytest.approx(1 / (1 / rates.language_model + 1 / rates.steps))
    assert not (tmp_path / "run").exists()
