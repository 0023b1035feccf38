"""Where a run goes on: for how long, on how many processes, and from checkpoints that other versions wrote."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_msae.data import as_documents
from hf_msae.data.hash_split import hash_value
from hf_msae.training import CheckpointError, SAETrainingArguments
from hf_msae.training.checkpoints import STATE_NAME, _digest
from hf_msae.training.resuming import redistribute, resumed_length
from hf_msae.training.schedules import Length, learning_rate_factor

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


@pytest.mark.parametrize("then", [None, 3])
def test_other_threads_are_told_of(trainer, tmp_path, caplog, then):
    """They round in another way, so bits differ; a checkpoint of before threads were written says nothing."""
    trainer().train()
    name = tmp_path / "run" / "checkpoint-8" / STATE_NAME
    state = {key: value for key, value in json.loads(name.read_text()).items() if key != "digest"}
    threads = state.pop("threads")
    assert threads == torch.get_num_threads()
    state |= {} if then is None else {"threads": then}
    name.write_text(json.dumps(state | {"digest": _digest(state)}))
    trainer(resume_from_checkpoint=str(name.parent)).train()
    told = f"was computed with {then} threads, and this process has {threads}" in caplog.text
    assert told == (then is not None)


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
    assert sorted(read) == sorted(
        text for text in order[first:] if not run.evaluator.held_out.split.holds(hash_value(text))
    )
    used = [state["batches"]["position"] for state in states]
    assert f"{used[1]:,} tokens after them" in words
    assert f"{len(states[0]['batches']['windows']['batch']['carry']):,} tokens before" in words


# Checkpoints that other versions wrote


def test_a_checkpoint_holds_what_it_always_held(trainer, tmp_path):
    """Names that older checkpoints have, by which they are read; a new one needs a reader of the old, too."""
    trainer(max_steps=2, save_steps=2).train()
    folder = tmp_path / "run" / "checkpoint-2"
    state = json.loads((folder / STATE_NAME).read_text())
    assert set(state) == {
        "step", "first_max_steps", "extensions", "tokens", "tokens_per_step", "threads", "arguments", "data",
        "feeds", "skipped_documents", "files", "digest",
    }  # fmt: skip
    (place,) = state["feeds"]
    assert set(place) == {"epoch", "batches", "outliers"}
    learner = torch.load(folder / "learner.pt", weights_only=True)
    assert set(learner) == {"optimizer", "moments", "sparsity_weight", "log"}
    assert set(learner["optimizer"]) == {"step", "b_dec", "peak_lr"}
    assert set(load_file(folder / "learner.safetensors")) == {
        "threshold", "silent_tokens", *(f"{name}.{kind}" for name in ("W_enc", "b_enc", "W_dec")
                                        for kind in ("exp_avg", "exp_avg_sq")),
    }  # fmt: skip


def test_the_length_stays_unless_it_is_asked_for():
    state = {
        "step": 6,
        "first_max_steps": 8,
        "extensions": [[4, 10]],
        "arguments": {"max_steps": 10, "max_tokens": None},
    }
    args = SAETrainingArguments(max_steps=10)

    def uncalled():
        raise AssertionError("tokens were counted for nothing")

    length = resumed_length(state, args, uncalled)
    assert (length, length.max_steps) == (Length(8, ((4, 10),)), 10)
    assert resumed_length(state, SAETrainingArguments(max_steps=12), lambda: 12) == Length(8, ((4, 10), (6, 12)))
    assert resumed_length(state, SAETrainingArguments(max_tokens=10_000), lambda: 10) == length
    assert json.loads(json.dumps(length.to_dict())) == {"first_max_steps": 8, "extensions": [[4, 10]]}
