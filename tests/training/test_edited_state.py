"""A checkpoint whose state was edited, with a digest that fits: one sentence, whatever was done to it."""

import copy
import json

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.data import DatasetError
from hf_msae.training import CheckpointError, SAETrainer, SAETrainingArguments
from hf_msae.training.checkpoints import STATE_NAME, _digest, find_checkpoint
from hf_msae.training.learner import make_learners
from hf_msae.training.resuming import check_state, choose_checkpoint, resumed_length

pytestmark = pytest.mark.slow

OTHERS = (None, True, -1, 1.5, "text", [], [None], {}, {"a": 1})


@pytest.fixture(scope="module")
def make(tmp_path_factory, lm, tokenizer, texts):
    folder = tmp_path_factory.mktemp("edited")

    def trainer(steps: int) -> SAETrainer:
        torch.manual_seed(0)
        config = MatryoshkaSAEConfig(hidden_size=16, num_latents=32, prefix_sizes=[8, 32], k=4, site="layers.0")
        args = SAETrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=64, block_tokens=300, save_steps=2,
            eval_tokens=400, calibration_tokens=200, ce_tokens=0, context_length=32, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        return SAETrainer(lm, MatryoshkaSAE(config), args, texts, processing_class=tokenizer)

    trainer(2).train()
    return trainer


@pytest.fixture(scope="module")
def state(make):
    return json.loads((make(4).run.output_dir / "checkpoint-2" / STATE_NAME).read_text())


def places(value, path=()):
    """The paths to all values inside of dicts and the first of lists."""
    if isinstance(value, dict):
        for key in value:
            yield (*path, key)
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield (*path, 0)
        yield from places(value[0], (*path, 0))


def mutants(state):
    """(what was done, the state) for every key dropped and every value made one of another type."""
    for path in places(state):
        for other in ("dropped", *OTHERS):
            mutant = copy.deepcopy(state)
            holder = mutant
            for key in path[:-1]:
                holder = holder[key]
            if other == "dropped":
                del holder[path[-1]]
            elif type(other) is type(holder[path[-1]]) and not isinstance(other, dict | list):
                continue
            else:
                holder[path[-1]] = other
            yield f"{'.'.join(map(str, path))}: {other!r}", mutant


def write(trainer, state) -> None:
    state = {key: value for key, value in state.items() if key != "digest"}
    path = trainer.run.output_dir / "checkpoint-2" / STATE_NAME
    path.write_text(json.dumps(state | {"digest": _digest(state)}))


def test_every_mutation_is_refused_in_words_or_does_no_harm(make, state):
    """Through all that reads a state before the first step, of one trainer."""
    trainer, went_on, refused = make(4), [], 0
    trainer._data = trainer._fingerprints()
    trainer.state.max_steps = 4
    trainer.learners = make_learners(trainer.run, trainer.saes, trainer.sites, trainer._length)
    trainer.log.open()
    for done, mutant in mutants(state):
        if done.startswith("digest"):
            continue
        write(trainer, mutant)
        try:
            checkpoint = choose(trainer)
            trainer._load_checkpoint(checkpoint)
            next(trainer.loader)
            went_on.append(done)
        except (CheckpointError, DatasetError):
            refused += 1
    write(trainer, state)
    assert refused > 400
    # What may be something else without harm: data that checkpoints before did not name, lists that may be empty,
    # hashes' own text, what a resumed run may change.
    harmless = ("data", "skipped_documents", "extensions", "arguments.", "feeds.0.batches", "tokens", "step")
    assert all(done.startswith(harmless) for done in went_on), went_on


def choose(trainer):
    trainer.run.args.resume_from_checkpoint = "last"
    checkpoint = choose_checkpoint(trainer.run)
    resumed_length(checkpoint.state, trainer.args, lambda: 4)
    return checkpoint


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '"text"', "{}", '{"digest": 1}', "[" * 100_000, "\xff\xfe"])
def test_what_is_no_state_at_all_is_refused(make, state, text):
    trainer = make(4)
    (trainer.run.output_dir / "checkpoint-2" / STATE_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="checkpoint-2 is damaged"):
        find_checkpoint("last", trainer.run.output_dir)
    write(trainer, state)


@pytest.mark.parametrize("files", [{}, [], None, {"../run": {"size": 1, "sha256": "0"}}, {"/etc/passwd": {"size": 1}}])
def test_a_state_without_the_hashes_of_its_files_is_refused(make, state, files):
    trainer = make(4)
    write(trainer, state | {"files": files})
    with pytest.raises(CheckpointError, match="does not say what its files must be"):
        find_checkpoint("last", trainer.run.output_dir)
    one = dict(state["files"])
    del one["learner.safetensors"]
    write(trainer, state | {"files": one})
    with pytest.raises(CheckpointError, match=r"does not say what learner\.safetensors must be"):
        find_checkpoint("last", trainer.run.output_dir)
    write(trainer, state)


def test_the_state_of_a_run_is_one(state):
    check_state(state)
