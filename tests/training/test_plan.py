"""The plan's numbers against shapes, a real run's peak and a real run's files; lengths that change; processes too."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from patience import HANG_SECONDS
from safetensors.torch import load_file

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.data import as_documents
from hf_msae.data.hash_split import lot
from hf_msae.training import CheckpointError, SAETrainer, SAETrainingArguments
from hf_msae.training.optimization import learning_rate_factor
from hf_msae.training.resuming import redistribute

sys.path.append(str(Path(__file__).parent))

from runs_of_processes import launch

# How far the expected peak may be from the measured one, as a share of it.
TOLERANCE = 0.2


def make_sae(num_latents: int = 64, **changes) -> MatryoshkaSAE:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_latents": num_latents, "prefix_sizes": [8, num_latents], "k": 4}
    return MatryoshkaSAE(MatryoshkaSAEConfig(**(shape | {"site": "layers.0"} | changes)))


@pytest.fixture
def trainer(tmp_path, lm, tokenizer, texts):
    def make(sae=None, name="run", **changes):
        settings = {"max_steps": 12, "per_device_train_batch_size": 64, "block_tokens": 300, "context_length": 32}
        settings |= {
            "eval_tokens": 400,
            "calibration_tokens": 200,
            "ce_tokens": 0,
            "save_steps": 4,
            "logging_steps": 1,
        }
        settings |= {"use_cpu": True, "disable_tqdm": True}
        args = SAETrainingArguments(output_dir=str(tmp_path / name), **(settings | changes))
        return SAETrainer(lm, sae or make_sae(), args, texts, processing_class=tokenizer)

    return make


def test_counts_follow_from_shapes(trainer):
    plan = trainer([make_sae(), make_sae(128, k=2)]).plan()
    parameters = sum(2 * 16 * latents + latents + 16 for latents in (64, 128))
    assert plan.kept["gradients"] == 4 * parameters
    assert plan.kept["optimizer"] == 8 * parameters
    assert plan.kept["counters"] == 8 * (64 + 128)
    assert plan.kept["activation buffers"] == 2 * (300 + 32) * (16 * 4 + 8)
    assert (plan.steps, plan.tokens) == (12, 12 * 64)
    assert plan.peak == plan.before + sum(plan.kept.values()) + max(plan.passing.values())
    assert plan.warnings() == []


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
    run = trainer(make_sae(4096))
    plan = run.plan()
    assert not (tmp_path / "run").exists()
    run.train()

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert plan.checkpoint == pytest.approx(size(tmp_path / "run" / "checkpoint-12"), rel=0.1)
    assert size(tmp_path / "run") < plan.disk_needed < 1.8 * size(tmp_path / "run")  # one more, for a while


def test_what_does_not_fit_is_said_before_the_run(trainer, caplog):
    run = trainer(make_sae(4096), block_tokens=10**13, max_steps=10**12, save_total_limit=None, save_steps=1)
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


# The length of a run


def test_an_extended_run_warms_up_again_and_follows_the_new_schedule():
    args = SAETrainingArguments(warmup_steps=10, decay_steps=0.5)
    rate = [learning_rate_factor(step, 100, args, [(80, 200)]) for step in range(200)]
    old = [learning_rate_factor(step, 100, args) for step in range(100)]
    new = [learning_rate_factor(step, 200, args) for step in range(200)]
    assert rate[79] == learning_rate_factor(79, 100, args) == pytest.approx(0.42)
    rises = [after - before for before, after in pairwise(rate[79:85])]
    assert rises == pytest.approx([0.1] * 5)  # from where it was, at the pace of the warm-up
    assert rate[86:] == new[86:]
    assert rate[199] == pytest.approx(0.01)
    assert all(value <= 1 for value in rate)
    assert old[99] == pytest.approx(0.02)
    # A second change builds on the first.
    twice = [learning_rate_factor(step, 100, args, [(80, 200), (190, 400)]) for step in range(400)]
    assert twice[189] == rate[189]
    assert twice[190] == pytest.approx(rate[189] + 0.1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_is_extended_and_remembers_it(trainer, tmp_path, caplog):
    trainer().train()
    trainer(max_steps=20, resume_from_checkpoint="last").train()
    assert "The run has 20 steps now, after 12; from step 12 on" in caplog.text
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 20
    log = [json.loads(line) for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines()]
    rates = {entry["step"]: entry["learning_rate"] for entry in log}
    assert list(rates) == list(range(1, 21))
    assert rates[13] > rates[12]
    assert rates[20] < rates[13]
    # An extended run resumes to the same bits, too.
    whole = weights(tmp_path / "run")
    again = str(tmp_path / "run" / "checkpoint-16")
    trainer(max_steps=20, resume_from_checkpoint=again).train()
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights(tmp_path / "run").items())


def test_a_run_is_not_ended_before_where_it_is(trainer):
    trainer().train()
    with pytest.raises(CheckpointError, match=r"checkpoint is of step 12, past the 5 steps asked for now"):
        trainer(max_steps=5, resume_from_checkpoint="last").train()


def test_another_batch_is_refused_with_the_number_that_must_stay(trainer):
    trainer().train()
    with pytest.raises(CheckpointError, match=r"of all processes together: 64 then, 32 now; set per_device"):
        trainer(per_device_train_batch_size=32, resume_from_checkpoint="last").train()


# The number of processes


def loaders_after(trainer, ranks: int, batches: int) -> list[dict]:
    """The states of the loaders of `ranks` processes that have taken some batches each, the later ones more."""
    states = []
    for rank in range(ranks):
        loader = trainer().loader
        loader.rank, loader.num_processes = rank, ranks
        for _ in range(batches + rank):
            next(loader)
        states.append(loader.state_dict())
    return states


@pytest.mark.parametrize("num_processes", [1, 3])
def test_documents_are_dealt_anew_and_none_is_left_out(trainer, texts, num_processes):
    run = trainer()
    states = loaders_after(trainer, 2, 12)
    place = [state["batches"]["windows"]["batch"]["documents"] for state in states]
    first = min(documents["next"] for documents in place)
    read = []
    for rank in range(num_processes):
        state, words = redistribute(states, rank, num_processes)
        assert f"dealt anew from number {first}" in words
        shuffled = run.loader.documents.shuffle(state["batches"]["settings"]["seed"])
        documents = shuffled.shard(rank, num_processes)
        documents.load_state_dict(state["batches"]["windows"]["batch"]["documents"])
        read += list(documents)
        loader = trainer().loader
        loader.rank, loader.num_processes = rank, num_processes
        loader.load_state_dict(state)
        assert next(loader)[run.sites[next(iter(run.sites))]].shape == (64, 16)
    order = list(as_documents(texts).shuffle(states[0]["batches"]["settings"]["seed"]))
    assert sorted(read) == sorted(text for text in order[first:] if not run.evaluator.held_out.split.holds(lot(text)))
    used = [state["batches"]["position"] for state in states]
    assert f"{used[1]:,} tokens after them" in words
    assert f"{len(states[0]['batches']['windows']['batch']['carry']):,} tokens before" in words
