"""A checkpoint belongs to its data: other data is refused, or, where that is wanted, read from its beginning."""

import json
import shutil

import datasets
import pytest
import torch
from safetensors.torch import load_file
from small_runs import make_sae, make_trainer
from transformers import TrainerCallback

from hf_msae.data import (
    ActivationStream,
    CachedActivations,
    TokenWindows,
    as_documents,
    cache_activations,
    load_documents,
)
from hf_msae.training import CheckpointError
from hf_msae.training.checkpoints import STATE_NAME, _digest

pytestmark = pytest.mark.slow


class Stop(TrainerCallback):
    """Ends the process's work at a step, as a crash would."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise ConnectionAbortedError("crash")


@pytest.fixture
def train(tmp_path, lm, tokenizer):
    def run(dataset, eval_dataset=None, callbacks=(), **changes):
        sae = make_sae(num_latents=32, prefix_sizes=[8, 32])
        trainer = make_trainer(lm, tokenizer, dataset, tmp_path / "run", sae, eval_dataset, callbacks, **changes)
        trainer.train()
        return trainer

    return run


def write(folder, kind, texts):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"texts.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif kind == "txt":
        path.write_text("\n\n".join(texts))
    else:
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path, batch_size=40)
    return path


def crash(train, dataset, eval_dataset=None, **changes):
    with pytest.raises(ConnectionAbortedError):
        train(dataset, eval_dataset, [Stop()], **changes)


KINDS = ("jsonl", "txt", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_moved_data_is_the_same_data_to_the_bit(train, tmp_path, texts, kind):
    path = write(tmp_path / "here", kind, texts)
    crash(train, load_documents(path))
    moved = shutil.move(path, tmp_path / f"elsewhere.{kind}")
    train(load_documents(moved), resume_from_checkpoint="last")
    train(load_documents(moved), output_dir=str(tmp_path / "whole"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("other", [*KINDS, "list"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_training_data_is_refused_or_read_from_its_beginning(train, tmp_path, texts, kind, other, caplog):
    crash(train, load_documents(write(tmp_path / "then", kind, texts)))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    others = [f"w1 w2 {text}" for text in texts]
    now = others if other == "list" else load_documents(write(tmp_path / "now", other, others))
    with pytest.raises(CheckpointError, match=r"other data \(to train on, .* then, .*--allow-other-data|same size"):
        train(now, resume_from_checkpoint="last")
    trainer = train(
        now, resume_from_checkpoint="last", allow_other_data=True, max_steps=5, output_dir=str(tmp_path / "again")
    )
    assert "read from its beginning" in caplog.text
    fresh = train(now, max_steps=1, output_dir=str(tmp_path / "fresh"))
    ours, theirs = trainer.loader.state_dict(), fresh.loader.state_dict()
    for state in (ours, theirs):
        state["batches"]["settings"].pop("norm_limits")  # a run keeps those that it began with
    assert ours == theirs  # one step was taken from it
    state = json.loads((tmp_path / "again" / "checkpoint-5" / STATE_NAME).read_text())
    assert state["data"] == trainer._data
    train(now, resume_from_checkpoint="last", max_steps=6, output_dir=str(tmp_path / "again"))


def test_other_data_to_measure_on_is_refused_or_taken(train, tmp_path, texts, caplog):
    crash(train, texts, texts[:80])
    with pytest.raises(CheckpointError, match="to measure on"):
        train(texts, texts[40:120], resume_from_checkpoint="last")
    with pytest.raises(CheckpointError, match="to measure on"):
        train(texts, resume_from_checkpoint="last")
    train(texts, texts[40:120], resume_from_checkpoint="last", allow_other_data=True)
    assert "to measure on" in caplog.text
    train(texts, texts[40:120], output_dir=str(tmp_path / "whole"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)  # nothing of training depends on it


def test_another_cache_is_refused(train, tmp_path, lm, tokenizer, texts):
    def cache(name, documents):
        windows = TokenWindows(as_documents(documents), tokenizer, context_length=32)
        stream = ActivationStream(
            lm, ["model.layers.0:output"], windows, batch_size=100, block_tokens=300, lm_batch_size=8, pad_id=0
        )
        cache_activations(stream, tmp_path / name, max_tokens=3000, shard_tokens=500)
        return CachedActivations(tmp_path / name, batch_size=1)

    crash(train, cache("one", texts))
    other = cache("two", [f"w1 w2 {text}" for text in texts])
    with pytest.raises(CheckpointError, match="to train on"):
        train(other, resume_from_checkpoint="last")
    train(other, resume_from_checkpoint="last", allow_other_data=True)


def test_a_checkpoint_that_does_not_know_its_data_goes_on_with_a_warning(train, tmp_path, texts, caplog):
    crash(train, texts)
    path = tmp_path / "run" / "checkpoint-4" / STATE_NAME
    state = json.loads(path.read_text())
    del state["data"], state["digest"]
    path.write_text(json.dumps(state | {"digest": _digest(state)}))
    train(texts, resume_from_checkpoint="last")
    assert "before checkpoints said which data" in caplog.text
