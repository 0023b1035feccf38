"""The SAE in memory is the SAE that was measured and saved: after a run, in callbacks, after `evaluate()`."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.data import TokenWindows, as_documents, harvest
from hf_msae.sites import Site
from hf_msae.training import SAETrainer, SAETrainingArguments, TrainingInterrupted
from hf_msae.training.resuming import BY_SAVING

ACTIVATIONS = ("batch_topk", "topk", "jumprelu", "relu")


def make_sae(activation: str, num_latents: int = 64) -> MatryoshkaSAE:
    torch.manual_seed(0)
    sizes = [8, 24, num_latents]
    return MatryoshkaSAE(
        MatryoshkaSAEConfig(
            hidden_size=16, num_latents=num_latents, prefix_sizes=sizes, k=4, site="layers.0", activation=activation
        )
    )


@pytest.fixture
def make_trainer(tmp_path, lm, tokenizer, texts):
    """A trainer in `tmp_path/run`."""

    def make(sae, callbacks=(), **changes):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 8,
            "per_device_train_batch_size": 64,
            "block_tokens": 300,
            "eval_tokens": 400,
            "calibration_tokens": 200,
            "ce_tokens": 0,
            "context_length": 32,
            "save_steps": 4,
            "save_total_limit": None,
            "disable_tqdm": True,
            "use_cpu": True,
            **changes,
        }
        return SAETrainer(
            lm, sae, SAETrainingArguments(**settings), texts, processing_class=tokenizer, callbacks=callbacks
        )

    return make


@pytest.fixture(scope="module")
def on_text(lm, tokenizer, texts):
    """Activations of real tokens at an SAE's site."""

    def get(sae) -> torch.Tensor:
        windows = TokenWindows(as_documents(texts[:40]), tokenizer, context_length=32)
        site = Site.parse(sae.config.site)
        return torch.cat([batch[site] for batch in harvest(lm, [site], windows, lm_batch_size=8)])

    return get


def assert_held_is_saved(held: MatryoshkaSAE, folder: Path, x: torch.Tensor) -> None:
    """Every tensor, the configuration, the mode, and what it computes are those of a folder."""
    saved = MatryoshkaSAE.from_pretrained(folder)
    ours, theirs = held.state_dict(), saved.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    here, there = held.config.to_diff_dict(), saved.config.to_diff_dict()
    for key in (here.keys() | there.keys()) - BY_SAVING:
        assert here.get(key) == there.get(key), key
    assert held.training == saved.training
    with torch.no_grad():
        assert torch.equal(held.encode(x), saved.encode(x))
        assert torch.equal(held(x).reconstruction, saved(x).reconstruction)


class Compare(TrainerCallback):
    """Looks at the SAE that callbacks are given when something was saved or measured, and at how it is in training."""

    def __init__(self, output_dir: Path, get) -> None:
        self.output_dir, self.get = output_dir, get
        self.events: list[str] = []

    def on_save(self, args, state, control, model, **kwargs):
        assert_held_is_saved(model, self.output_dir / f"checkpoint-{state.global_step}", self.get(model))
        self.events.append("save")

    def on_evaluate(self, args, state, control, model, **kwargs):
        assert not model.training
        with torch.no_grad():
            latents = model.encode(self.get(model))
        assert (latents > 0).sum(-1).float().mean() == pytest.approx(model.config.measured["l0"][-1], rel=0.15)
        self.events.append("evaluate")

    def on_step_begin(self, args, state, control, model, **kwargs):
        assert model.training

    def on_train_end(self, args, state, control, model, **kwargs):
        assert_held_is_saved(model, self.output_dir, self.get(model))
        self.events.append("end")


@pytest.mark.parametrize("shard_latents", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_memory_is_disk_after_training(make_trainer, on_text, tmp_path, activation, shard_latents):
    sae = make_sae(activation)
    trainer = make_trainer(sae, shard_latents=shard_latents)
    measured = next(iter(trainer.train().values()))
    assert_held_is_saved(sae, tmp_path / "run", on_text(sae))
    assert sae.config.measured["l0"][-1] == pytest.approx(measured.levels[-1].l0, abs=1e-4)

    again = next(iter(trainer.evaluate().values()))
    assert again == measured
    assert_held_is_saved(sae, tmp_path / "run", on_text(sae))

    sae.save_pretrained(tmp_path / "by hand")
    assert_held_is_saved(sae, tmp_path / "by hand", on_text(sae))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_callbacks_see_what_was_measured_and_saved(make_trainer, on_text, tmp_path, activation):
    compare = Compare(tmp_path / "run", on_text)
    make_trainer(make_sae(activation), [compare], eval_steps=3).train()
    assert compare.events == ["evaluate", "save", "evaluate", "save", "end"]


def test_every_sae_of_a_grid_is_held_as_it_was_saved(make_trainer, on_text, tmp_path):
    saes = {activation: make_sae(activation) for activation in ACTIVATIONS}
    trainer = make_trainer(saes)
    trainer.train()
    for name, sae in saes.items():
        assert_held_is_saved(sae, trainer.run.sae_folder(tmp_path / "run", name), on_text(sae))


class Interrupt(TrainerCallback):
    """Ctrl-C after a step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_interrupted_run_holds_what_it_saved(make_trainer, on_text, tmp_path, activation):
    sae = make_sae(activation)
    with pytest.raises(TrainingInterrupted):
        make_trainer(sae, [Interrupt()]).train()
    assert_held_is_saved(sae, tmp_path / "run" / "checkpoint-6", on_text(sae))


class Look(TrainerCallback):
    """Measures in the middle of a run, and looks at what training then goes on with."""

    trainer: SAETrainer

    def on_step_end(self, args, state, control, model, **kwargs):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.trainer.evaluate()
        assert model.training
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            assert torch.equal(before[name], model.state_dict()[name]), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_looking_changes_no_step(make_trainer, tmp_path, activation):
    plain, watched = make_sae(activation), make_sae(activation)
    make_trainer(plain, output_dir=str(tmp_path / "plain")).train()
    look = Look()
    look.trainer = make_trainer(watched, [look], eval_steps=2, save_steps=3)
    look.trainer.train()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name


def test_a_checkpoint_holds_numbers_of_its_own_weights_only(make_trainer, tmp_path):
    make_trainer(make_sae("batch_topk"), eval_steps=3, save_steps=1).train()
    found = {
        step: json.loads((tmp_path / "run" / f"checkpoint-{step}" / "config.json").read_text()).get("measured")
        for step in range(1, 9)
    }
    assert {step for step, measured in found.items() if measured is not None} == {3, 6}


def test_a_run_that_measures_in_passing_resumes(make_trainer, tmp_path):
    """What was measured is no part of what an SAE is."""
    sae = make_sae("batch_topk")
    with pytest.raises(TrainingInterrupted):
        make_trainer(sae, [Interrupt()], eval_steps=2, save_steps=2).train()
    resumed, whole = make_sae("batch_topk"), make_sae("batch_topk")
    make_trainer(resumed, eval_steps=2, save_steps=2, resume_from_checkpoint="last").train()
    make_trainer(whole, output_dir=str(tmp_path / "whole"), eval_steps=2, save_steps=2).train()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_there_is_nothing_to_measure_before_training(make_trainer):
    with pytest.raises(RuntimeError, match="train\\(\\) first"):
        make_trainer(make_sae("batch_topk")).evaluate()
