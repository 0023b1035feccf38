"""Training from an activation cache on the Hub is training from the folder that was pushed, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from runs_of_processes import launch
from safetensors.torch import load_file
from small_runs import SETTINGS, make_sae
from test_distributed import make_cache
from transformers import TrainerCallback

from hf_msae import MatryoshkaSAE, load_activation_cache, push_activation_cache
from hf_msae.data import CachedActivations
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.training.checkpoints import CheckpointError

pytestmark = pytest.mark.slow

SITE = "model.layers.0:output"
RUN = SETTINGS | {"per_device_train_batch_size": 512, "max_steps": 20, "save_steps": 10, "logging_steps": 5}


class Stop(TrainerCallback):
    """Ends the process's work in the second pass over the data, as a crash would."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 17:
            raise ConnectionAbortedError("crash")


@pytest.fixture(scope="module")
def cache(tmp_path_factory, lm, tokenizer) -> Path:
    """9,216 tokens in three shards: 17 steps, after which it begins again."""
    return make_cache(tmp_path_factory.mktemp("on_the_hub") / "cache", lm, tokenizer, sites=("layers.0",))


def train(dataset, folder: Path, callbacks=(), model=None, tokenizer=None, resume=None, **changes) -> SAETrainer:
    args = SAETrainingArguments(**(RUN | {"output_dir": str(folder)} | changes))
    trainer = SAETrainer(model, make_sae(site=SITE), args, dataset, processing_class=tokenizer, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def results(folder: Path) -> tuple[dict, list[dict]]:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]
    return load_file(folder / "model.safetensors"), log


def assert_same(one: Path, other: Path) -> None:
    (ours, log), (theirs, other_log) = results(one), results(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert log == other_log


def test_the_same_bits_as_from_the_folder_also_when_resumed_and_from_the_other(cache, tmp_path, hub):
    repo = f"{hub.user}/activations"
    push_activation_cache(cache, repo)
    train(CachedActivations(cache, batch_size=1), tmp_path / "folder")
    train(load_activation_cache(repo), tmp_path / "hub")
    assert_same(tmp_path / "hub", tmp_path / "folder")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"datasets:\n- {repo}" in card
    for crashed, resumed in ((repo, repo), (repo, cache), (cache, repo)):
        folder = tmp_path / f"{crashed}-{resumed}".replace("/", "_")
        with pytest.raises(ConnectionAbortedError):
            train(load_activation_cache(crashed), folder, callbacks=[Stop()])
        train(load_activation_cache(resumed), folder, resume="last")
        assert_same(folder, tmp_path / "folder")


def test_a_push_amid_a_run_is_not_seen_and_afterwards_is_other_data(cache, tmp_path, lm, tokenizer, hub):
    """Shards of the second cache have the names of the first one's."""
    repo = f"{hub.user}/activations"
    push_activation_cache(cache, repo)
    first = hub.repo(repo, "dataset").at("main").sha
    opened = load_activation_cache(repo)
    other = make_cache(tmp_path / "other", lm.__class__(lm.config).eval(), tokenizer, sites=("layers.0",))
    push_activation_cache(other, repo)
    train(CachedActivations(cache, batch_size=1), tmp_path / "folder")
    train(opened, tmp_path / "opened")
    assert_same(tmp_path / "opened", tmp_path / "folder")
    with pytest.raises(CheckpointError, match="to train on"):
        train(load_activation_cache(repo), tmp_path / "opened", resume="last", max_steps=21)
    train(load_activation_cache(repo, revision=first), tmp_path / "opened", resume="last", max_steps=21)


def test_processes_read_what_the_first_of_them_found(cache, tmp_path, lm, tokenizer, hub):
    """Between one process and the next somebody pushed another cache."""
    repo, shape = f"{hub.user}/activations", make_sae(site=SITE).config.to_dict()
    shape = {name: shape[name] for name in ("hidden_size", "num_latents", "prefix_sizes", "k", "site")}
    push_activation_cache(cache, repo)
    other = make_cache(tmp_path / "other", lm.__class__(lm.config).eval(), tokenizer, sites=("layers.0",))
    first = hub.repo(repo, "dataset").at("main").sha
    push_activation_cache(other, repo)
    args = RUN | {"per_device_train_batch_size": 256}
    plans = {"hub": {"cache": repo, "commits": [first, None]}, "folder": {"cache": str(cache)}}
    for name, plan in plans.items():
        launch(2, plan | {"saes": {"sae": shape}, "args": args | {"output_dir": str(tmp_path / name)}})
    assert_same(tmp_path / "hub", tmp_path / "folder")


def test_the_quantization_of_the_cache_is_that_of_its_saes(cache, tmp_path, lm, tokenizer, hub, caplog):
    """However the language model given for measuring is, and also where none is."""
    index = json.loads((cache / "index.json").read_text())
    assert index["quantization"] is None
    copy = tmp_path / "cache"
    copy.mkdir()
    for shard in cache.glob("*.safetensors"):
        (copy / shard.name).symlink_to(shard)
    (copy / "index.json").write_text(json.dumps(index | {"quantization": "4bit"}))
    train(CachedActivations(copy, batch_size=1), tmp_path / "alone", max_steps=1)
    assert not caplog.records
    train(CachedActivations(copy, batch_size=1), tmp_path / "beside", max_steps=1, model=lm, tokenizer=tokenizer)
    assert "in 4bit, and the language model given is as it was saved: cross-entropy" in caplog.text
    for name in ("alone", "beside"):
        assert MatryoshkaSAE.from_pretrained(tmp_path / name).config.base_model_quantization == "4bit"
        assert "in 4bit (bitsandbytes)" in (tmp_path / name / "README.md").read_text()
    (copy / "index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "quantization"}))
    train(CachedActivations(copy, batch_size=1), tmp_path / "older", max_steps=1)
    assert MatryoshkaSAE.from_pretrained(tmp_path / "older").config.base_model_quantization is None
