"""The SAE in memory is the SAE that was measured and saved: after a run, in callbacks, after `evaluate()`."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from small_runs import make_sae, make_trainer
from transformers import TrainerCallback

from hf_msae import MatryoshkaSAE
from hf_msae.data import TokenWindows, as_documents, harvest
from hf_msae.sites import Site
from hf_msae.training import SAETrainer, TrainingInterrupted
from hf_msae.training.resuming import BY_SAVING

pytestmark = pytest.mark.slow

ACTIVATIONS = ("batch_topk", "topk", "jumprelu", "relu")


def sae_of(activation: str) -> MatryoshkaSAE:
    return make_sae(activation=activation, prefix_sizes=[8, 24, 64])


@pytest.fixture
def trainer_of(tmp_path, lm, tokenizer, texts):
    """A trainer in `tmp_path/run`, of which all checkpoints stay."""

    def make(sae, callbacks=(), **changes):
        changes = {"save_total_limit": None} | changes
        return make_trainer(lm, tokenizer, texts, tmp_path / "run", sae, callbacks=callbacks, **changes)

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
def test_memory_is_disk_after_training(trainer_of, on_text, tmp_path, activation, shard_latents):
    sae = sae_of(activation)
    trainer = trainer_of(sae, shard_latents=shard_latents)
    measured = next(iter(trainer.train().values()))
    assert_held_is_saved(sae, tmp_path / "run", on_text(sae))
    assert sae.config.measured["l0"][-1] == pytest.approx(measured.levels[-1].l0, abs=1e-4)

    again = next(iter(trainer.evaluate().values()))
    assert again == measured
    assert_held_is_saved(sae, tmp_path / "run", on_text(sae))

    sae.save_pretrained(tmp_path / "by hand")
    assert_held_is_saved(sae, tmp_path / "by hand", on_text(sae))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_callbacks_see_what_was_measured_and_saved(trainer_of, on_text, tmp_path, activation):
    compare = Compare(tmp_path / "run", on_text)
    trainer_of(sae_of(activation), [compare], eval_steps=3).train()
    assert compare.events == ["evaluate", "save", "evaluate", "save", "end"]


def test_every_sae_of_a_grid_is_held_as_it_was_saved(trainer_of, on_text, tmp_path):
    saes = {activation: sae_of(activation) for activation in ACTIVATIONS}
    trainer = trainer_of(saes)
    trainer.train()
    for name, sae in saes.items():
        assert_held_is_saved(sae, trainer.run.sae_folder(tmp_path / "run", name), on_text(sae))


class Interrupt(TrainerCallback):
    """Ctrl-C after a step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_interrupted_run_holds_what_it_saved(trainer_of, on_text, tmp_path, activation):
    sae = sae_of(activation)
    with pytest.raises(TrainingInterrupted):
        trainer_of(sae, [Interrupt()]).train()
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
def test_looking_changes_no_step(trainer_of, tmp_path, activation):
    plain, watched = sae_of(activation), sae_of(activation)
    trainer_of(plain, output_dir=str(tmp_path / "plain")).train()
    look = Look()
    look.trainer = trainer_of(watched, [look], eval_steps=2, save_steps=3)
    look.trainer.train()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name


def test_a_checkpoint_holds_numbers_of_its_own_weights_only(trainer_of, tmp_path):
    trainer_of(sae_of("batch_topk"), eval_steps=3, save_steps=1).train()
    found = {
        step: json.loads((tmp_path / "run" / f"checkpoint-{step}" / "config.json").read_text()).get("measured")
        for step in range(1, 9)
    }
    assert {step for step, measured in found.items() if measured is not None} == {3, 6}


def test_a_run_that_measures_in_passing_resumes(trainer_of, tmp_path):
    """What was measured is no part of what an SAE is."""
    sae = sae_of("batch_topk")
    with pytest.raises(TrainingInterrupted):
        trainer_of(sae, [Interrupt()], eval_steps=2, save_steps=2).train()
    resumed, whole = sae_of("batch_topk"), sae_of("batch_topk")
    trainer_of(resumed, eval_steps=2, save_steps=2, resume_from_checkpoint="last").train()
    trainer_of(whole, output_dir=str(tmp_path / "whole"), eval_steps=2, save_steps=2).train()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_there_is_nothing_to_measure_before_training(trainer_of):
    with pytest.raises(RuntimeError, match="train\\(\\) first"):
        trainer_of(sae_of("batch_topk")).evaluate()
