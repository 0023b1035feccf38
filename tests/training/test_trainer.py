"""Whole runs on a tiny language model: what they leave, that they resume exactly, how they stop."""

import json
import os
import re
import signal
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, TrainerCallback

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.data import DatasetError
from hf_msae.data.hash_split import hash_value
from hf_msae.sites import SiteError
from hf_msae.training import (
    CheckpointError,
    SAETrainer,
    SAETrainingArguments,
    TrainingDiverged,
    TrainingInterrupted,
    training_bar,
)

pytestmark = pytest.mark.slow


def make_sae(**changes) -> MatryoshkaSAE:
    torch.manual_seed(0)
    config = {"hidden_size": 16, "num_latents": 64, "prefix_sizes": [8, 24, 64], "k": 4, "site": "layers.0", **changes}
    return MatryoshkaSAE(MatryoshkaSAEConfig(**config))


@pytest.fixture
def train(tmp_path, lm, tokenizer, texts):
    """Runs a training in `tmp_path/name`."""

    def run(sae=None, name="run", callbacks=(), model=lm, dataset=texts, **changes):
        settings = {
            "output_dir": str(tmp_path / name),
            "max_steps": 12,
            "per_device_train_batch_size": 64,
            "block_tokens": 300,
            "eval_tokens": 400,
            "calibration_tokens": 200,
            "ce_tokens": 200,
            "context_length": 32,
            "logging_steps": 3,
            "save_steps": 4,
            "save_total_limit": None,
            "disable_tqdm": True,
            "use_cpu": True,
            **changes,
        }
        trainer = SAETrainer(
            model,
            sae or make_sae(),
            SAETrainingArguments(**settings),
            dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        return trainer, trainer.train()

    return run


class Stop(TrainerCallback):
    """Ends the process's work at a step, as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise ConnectionAbortedError("crash")


class Signal(TrainerCallback):
    """Sends a signal to this process at a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(one, other):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_run_leaves_what_it_promises(train, tmp_path, lm):
    train(eval_steps=6)
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json", "model.safetensors", "metrics.json", "training_log.jsonl", "README.md",
        "training_arguments.json", "configuration_matryoshka_sae.py", "modeling_matryoshka_sae.py",
        "dense_ops.py", "sparse_ops.py",
    } <= names  # fmt: skip
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["tokens"] >= 400
    assert metrics["tokens_per_second"] > 0
    assert [level["prefix"] for level in metrics["levels"]] == [8, 24, 64]
    assert set(metrics["levels"][0]) >= {"l0", "fve", "ce_recovered", "dead"}
    assert metrics["levels"][0]["fve"] < metrics["levels"][2]["fve"] <= 1

    sae = AutoModel.from_pretrained(folder)
    assert sae.config.site == "model.layers.0:output"
    assert sae.config.measured["l0"] == pytest.approx([level["l0"] for level in metrics["levels"]], abs=1e-4)
    assert sae.firing_rate.sum() == pytest.approx(metrics["levels"][2]["l0"], rel=1e-5)
    assert (sae.max_activation[sae.firing_rate > 0] > sae.threshold[0]).all()

    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if "eval_levels" in line] == [6]
    card = (folder / "README.md").read_text()
    assert f"| 24 | {metrics['levels'][1]['l0']:.2f} |" in card
    assert "base_model:" not in card  # this model has no repo


def test_training_lowers_the_loss_of_every_activation(train, tmp_path):
    for activation in ("batch_topk", "topk", "jumprelu", "relu"):
        sae = make_sae(activation=activation)
        trainer, _ = train(sae, name=activation, max_steps=30, logging_steps=5, save_steps=0, ce_tokens=0)
        errors = [entry["level_losses"][-1] for entry in trainer.state.log_history]
        assert errors[-1] < 0.8 * errors[0], activation


def test_callbacks_find_the_latest_of_the_log_and_the_file_has_all(train, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_msae.training.trainer.KEPT_ENTRIES", 2)
    trainer, _ = train(make_sae(), name="log", max_steps=10, logging_steps=2, save_steps=0, ce_tokens=0)
    assert [entry["step"] for entry in trainer.state.log_history] == [8, 10]
    lines = (tmp_path / "log" / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8, 10]


def test_the_bar_tells_what_the_first_step_waits_for(train, monkeypatch, capsys):
    # It is drawn however fast it goes.
    monkeypatch.setattr(training_bar, "tqdm", partial(training_bar.tqdm, mininterval=0))
    train(disable_tqdm=False, lm_batch_size=1)
    shown = capsys.readouterr().err
    assert re.search(r"Reading [1-9]\d* of 300 tokens, then training: +0%", shown)
    assert re.search(r"Training: +100%", shown)


def test_a_crashed_run_resumes_to_the_same_bits(train, tmp_path):
    """Crash between checkpoints, inside a block of activations, with dead latents and running sums in flight."""
    sae = {"num_latents": 256, "prefix_sizes": [16, 256], "k": 3}
    train(make_sae(**sae), name="whole", dead_after_tokens=128)
    with pytest.raises(ConnectionAbortedError):
        train(make_sae(**sae), name="crashed", callbacks=[Stop(7)], dead_after_tokens=128)
    assert not (tmp_path / "crashed" / "model.safetensors").exists()
    train(make_sae(**sae), name="crashed", resume_from_checkpoint="last", dead_after_tokens=128)
    assert_same_weights(tmp_path / "whole", tmp_path / "crashed")

    def log(name):
        lines = map(json.loads, (tmp_path / name / "training_log.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]

    assert log("whole") == log("crashed")


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "jumprelu"},
        {"activation": "relu"},
        {"activation": "relu", "p_end": 0.2},
        {"aligned": True},
        {"prefix_sampling": "pareto", "num_sampled_prefixes": 3},
    ],
    ids=["jumprelu", "relu", "p annealed", "aligned", "pareto"],
)
def test_other_forms_resume_to_the_same_bits(train, tmp_path, options):
    train(make_sae(**options), name="whole", k_anneal_steps=6)
    with pytest.raises(ConnectionAbortedError):
        train(make_sae(**options), name="crashed", callbacks=[Stop(6)], k_anneal_steps=6)
    train(make_sae(**options), name="crashed", resume_from_checkpoint="last", k_anneal_steps=6)
    assert_same_weights(tmp_path / "whole", tmp_path / "crashed")


def test_the_number_of_checkpoints_changes_no_weight(train, tmp_path):
    train(name="often", save_steps=1, eval_steps=2)
    train(name="never", save_steps=0)
    assert_same_weights(tmp_path / "often", tmp_path / "never")


def test_a_grid_trains_each_as_if_alone_from_one_pass(train, tmp_path, lm):
    forwards: list[torch.nn.Module] = []
    passes = []

    class CountTrainingPasses(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            forwards.clear()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps:
                passes.append(len(forwards))

    handle = lm.model.layers[0].register_forward_hook(lambda module, *_: forwards.append(module))
    try:
        train(make_sae(), name="alone", save_steps=0, callbacks=[CountTrainingPasses()])
        saes = [make_sae(), make_sae(k=2), make_sae(num_latents=32, prefix_sizes=[8, 32])]
        train(saes, name="grid", save_steps=0, callbacks=[CountTrainingPasses()])
    finally:
        handle.remove()
    assert passes[0] == passes[1] > 0
    assert_same_weights(tmp_path / "alone", tmp_path / "grid" / "layers.0-64-k4")
    names = {path.parent.name for path in (tmp_path / "grid").glob("*/model.safetensors")}
    assert names == {"layers.0-64-k4", "layers.0-64-k2", "layers.0-32-k4"}
    assert set(json.loads((tmp_path / "grid" / "metrics.json").read_text())) == names


def test_a_grid_is_measured_from_one_pass_and_each_as_if_alone(train, lm):
    alone, _ = train(make_sae(), name="alone", ce_tokens=0)
    grid, _ = train([make_sae(), make_sae(k=2)], name="grid", ce_tokens=0)
    forwards: list[torch.nn.Module] = []
    handle = lm.model.layers[0].register_forward_hook(lambda module, *_: forwards.append(module))
    try:
        measured, passes = [], []
        for trainer in (alone, grid):
            forwards.clear()
            measured.append(trainer.evaluate())  # thresholds are those that were set at the end
            passes.append(len(forwards))
    finally:
        handle.remove()
    assert passes[0] == passes[1] > 0
    (lonely,) = measured[0].values()
    assert measured[1]["layers.0-64-k4"] == lonely != measured[1]["layers.0-64-k2"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_how_to_go_on(train, tmp_path, number):
    train(name="whole")
    with pytest.raises(TrainingInterrupted, match=r"step 5 of 12.*checkpoint-5.*--resume-from-checkpoint"):
        train(name="stopped", callbacks=[Signal(5, number)])
    train(name="stopped", resume_from_checkpoint="last")
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_nan_activations_stop_the_run(train, tokenizer, lm):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                lm.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")

    before = lm.model.layers[0].mlp.down_proj.weight.data.clone()
    try:
        with pytest.raises(TrainingDiverged, match=r"model.layers.0:output.*NaN.*last good checkpoint.*checkpoint-8"):
            train(callbacks=[Poison()])
    finally:
        lm.model.layers[0].mlp.down_proj.weight.data.copy_(before)


def test_a_diverging_loss_stops_with_its_step_and_is_never_saved(train, tmp_path):
    class Explode(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 5:
                model.W_dec.data.mul_(float("inf"))

    with pytest.raises(TrainingDiverged, match=r"at step 5\..*checkpoint-4.*learning rate"):
        train(callbacks=[Explode()])
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4"]


def test_another_runs_directory_is_refused(train, tmp_path):
    train()
    with pytest.raises(CheckpointError, match=r"holds another run.*--overwrite-output-dir"):
        train()
    train(overwrite_output_dir=True, max_steps=2)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 2


def test_resuming_with_other_arguments_is_refused(train):
    train()
    with pytest.raises(CheckpointError, match="seed: 0 then, 1 now"):
        train(resume_from_checkpoint="last", seed=1)
    with pytest.raises(CheckpointError, match=r"k of .*: 4 then, 5 now"):
        train(make_sae(k=5), resume_from_checkpoint="last")


def test_bad_input_is_refused_before_any_work(train, tmp_path):
    with pytest.raises(SiteError, match=r"layers\.7"):
        train(make_sae(site="layers.7"))
    with pytest.raises(ValueError, match=r"have 16\..*hidden_size=16"):
        train(make_sae(hidden_size=8, num_aux_latents=4))
    with pytest.raises(ValueError, match="context_length=65 is more than the 64 positions"):
        train(context_length=65)
    with pytest.raises(DatasetError):
        train(dataset=[])
    with pytest.raises(DatasetError, match="cannot hold out"):
        train(eval_tokens=10**6)
    with pytest.raises(ValueError, match="no site"):
        train(make_sae(site=None))
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_wide_k_for_the_first_prefix_is_warned_about(train, caplog):
    train(make_sae(k=6), max_steps=1, save_steps=0)
    assert "first prefix" in caplog.text


def test_data_that_ends_early_begins_again(train, texts, caplog):
    trainer, _ = train(dataset=texts[:80], max_steps=30, save_steps=0)
    assert trainer.loader.epoch >= 1
    assert "pass 2 begins" in caplog.text


def test_one_pass_is_the_default(train, texts, tokenizer):
    trainer, _ = train(max_steps=-1, save_steps=0)
    split = trainer.evaluator.held_out.split
    tokens = sum(len(text.split()) for text in texts if not split.holds(hash_value(text)))
    assert trainer.state.max_steps == tokens // 64
    assert trainer.loader.epoch == 0


def test_trackers_get_the_numbers(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(report_to=["tensorboard"], save_steps=0)
    events = EventAccumulator(str(next((tmp_path / "run" / "trackers").rglob("events*")).parent)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [3, 6, 9, 12]
