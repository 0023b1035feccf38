"""Latents on several processes are one dictionary: the same losses, weights and files as on one process.

97 latents are divisible neither by two nor by four.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_msae.modeling.selection import SINGLE_PROCESS
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_of_processes import launch
from safetensors.torch import load_file, save_file
from test_distributed import FORMS, SETTINGS, SHAPE, STEPS, assert_same_run, make_cache

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.data import CachedActivations
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.training.initial_weights import initial_decoder_rows
from hf_msae.training.sharded import ShardedSAE, read_latent_file, write_latent_file

pytestmark = pytest.mark.slow

SHARDED_SHAPE = SHAPE | {"num_latents": 97, "prefix_sizes": [8, 30, 97]}
SAES = {form: SHARDED_SHAPE | options for form, options in FORMS.items()}
SAES |= {"plain_topk": SHARDED_SHAPE | {"activation": "topk", "inference": "topk", "prefix_sizes": [97]}}
BATCHES = {1: 512, 2: 256, 4: 128}
HALF = STEPS // 2


def run(num_processes: int, cache: Path, output: Path, saes: dict = SAES, **changes) -> None:
    args = SETTINGS | {"shard_latents": True, "per_device_train_batch_size": BATCHES[num_processes]}
    args |= {"output_dir": str(output), **changes}
    if num_processes > 1:
        launch(num_processes, {"cache": str(cache), "saes": saes, "args": args})
        return
    args["shard_latents"] = False
    models = {form: MatryoshkaSAE(MatryoshkaSAEConfig(**options)) for form, options in saes.items()}
    SAETrainer(None, models, SAETrainingArguments(**args), CachedActivations(cache, batch_size=1)).train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lm, tokenizer) -> Path:
    """`1`, `2` and `4`: the run of every form on so many processes, with checkpoints in the middle and at the end."""
    folder = tmp_path_factory.mktemp("sharded")
    cache = make_cache(folder / "cache", lm, tokenizer)
    for num_processes in (1, 2, 4):
        run(num_processes, cache, folder / str(num_processes), save_steps=HALF)
    return folder


@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize("form", SAES)
def test_losses_weights_and_numbers_are_those_of_one_process(folder, form, num_processes):
    assert_same_run(folder / str(num_processes), folder / "1", form)


@pytest.mark.parametrize("form", ["batch_topk", "jumprelu"])
def test_the_files_are_those_of_one_process(folder, form):
    """What lies there, its order, shapes and kinds; `from_pretrained` reads it, and a prefix of it."""
    parts, whole = folder / "4" / form, folder / "1" / form
    assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}
    ours, theirs = (json.loads((each / "config.json").read_text()) for each in (parts, whole))
    ours.pop("measured"), theirs.pop("measured")
    assert ours == theirs
    sae, prefix = MatryoshkaSAE.from_pretrained(parts), MatryoshkaSAE.from_pretrained(parts, prefix=30)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae.encode(x)[:, :30], prefix.encode(x))
    for name in ("learner.safetensors", "model.safetensors"):
        ours, theirs = (load_file(folder / n / f"checkpoint-{HALF}" / form / name) for n in ("4", "1"))
        assert {key: (t.shape, t.dtype) for key, t in ours.items()} == {
            key: (t.shape, t.dtype) for key, t in theirs.items()
        }


@pytest.mark.parametrize("num_processes", [1, 4])
def test_a_checkpoint_of_two_processes_resumes_on_one_and_on_four(folder, tmp_path, num_processes):
    shutil.copytree(folder / "2" / f"checkpoint-{HALF}", tmp_path / "run" / f"checkpoint-{HALF}")
    log = (folder / "2" / "training_log.jsonl").read_text()
    (tmp_path / "run" / "training_log.jsonl").write_text(log)
    run(num_processes, folder / "cache", tmp_path / "run", save_steps=HALF, resume_from_checkpoint="last")
    for form in SAES:
        assert_same_run(tmp_path / "run", folder / "2", form)


def test_a_single_process_may_hold_the_only_part(folder, tmp_path):
    args = SETTINGS | {"per_device_train_batch_size": 512, "output_dir": str(tmp_path / "run"), "shard_latents": True}
    with torch.device("meta"):
        saes = {form: MatryoshkaSAE(MatryoshkaSAEConfig(**SAES[form])) for form in ("batch_topk", "relu")}
    cache = CachedActivations(folder / "cache", batch_size=1)
    SAETrainer(None, saes, SAETrainingArguments(**args), cache).train()
    for form in saes:
        assert_same_run(tmp_path / "run", folder / "1", form)


def test_micro_batches_of_all_processes_are_one_batch(folder, tmp_path):
    saes = {form: SAES[form] for form in ("batch_topk", "jumprelu", "log_loss")}
    sizes = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 4}
    run(2, folder / "cache", tmp_path / "run", saes, **sizes)
    for form in saes:
        assert_same_run(tmp_path / "run", folder / "1", form)


@pytest.mark.parametrize("shard_latents", [False, True])
def test_latents_are_sorted_across_processes(folder, tmp_path, shard_latents, monkeypatch):
    """97 latents on two processes change places as on one, a few columns at a time."""
    monkeypatch.setattr("hf_msae.training.learner.SORTED_COLUMNS", 5)
    saes = {form: SAES[form] for form in ("batch_topk", "jumprelu", "held_back")}
    run(1, folder / "cache", tmp_path / "1", saes, sort_latents_at=0.4)
    sizes = {"shard_latents": shard_latents, "sort_latents_at": 0.4}
    run(2, folder / "cache", tmp_path / "2", saes, **sizes)
    for form in saes:
        assert_same_run(tmp_path / "2", tmp_path / "1", form)
    ours, plain = (load_file(path / "batch_topk" / "model.safetensors") for path in (tmp_path / "1", folder / "1"))
    assert not torch.allclose(ours["W_dec"], plain["W_dec"])


@pytest.mark.parametrize("shard_latents", [False, True])
def test_messages_of_any_size_carry_the_same(folder, tmp_path, shard_latents):
    """With 700 the matrices' gradients travel by themselves, as those of real dictionaries do, and the vectors' share
    a message; rows come a few at a time to the process that writes.
    """
    forms = ("batch_topk", "jumprelu")
    constants = {f"hf_msae.training.collectives.{name}": 700 for name in ("PACK", "PIECE_BYTES")}
    args = SETTINGS | {"shard_latents": shard_latents, "per_device_train_batch_size": BATCHES[2]}
    plan = {"cache": str(folder / "cache"), "saes": {form: SAES[form] for form in forms}, "constants": constants}
    launch(2, plan | {"args": args | {"output_dir": str(tmp_path / "run")}})
    for form in forms:
        assert_same_run(tmp_path / "run", folder / "1", form)


def test_more_processes_than_latents_are_refused():
    class Three(type(SINGLE_PROCESS)):
        size = 3

    config = MatryoshkaSAEConfig(hidden_size=4, num_latents=2, k=1)
    with pytest.raises(ValueError, match=r"3 processes and num_latents=2"):
        ShardedSAE(config, Three(), torch.device("cpu"))


@given(st.integers(1, 90), st.integers(1, 20), st.integers(0, 50), st.integers(0, 50))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_process_draws_its_rows_of_one_matrix(num_latents, hidden_size, start, length):
    whole = torch.randn(num_latents, hidden_size, generator=torch.Generator().manual_seed(5))
    rows = slice(min(start, num_latents), min(start + length, num_latents))
    ours = initial_decoder_rows(num_latents, hidden_size, 5, rows)
    assert torch.equal(ours, torch.nn.functional.normalize(whole, dim=-1)[rows])


def test_many_blocks_of_rows_are_drawn_as_one(monkeypatch):
    monkeypatch.setattr("hf_msae.training.initial_weights.DRAWN_AT_ONCE", 100)
    for num_latents in (15, 16, 31, 97, 160):
        whole = torch.nn.functional.normalize(torch.randn(num_latents, 5, generator=torch.Generator().manual_seed(1)))
        assert torch.equal(initial_decoder_rows(num_latents, 5, 1, slice(3, 90)), whole[3:90])


def test_files_are_what_safetensors_writes_and_reads(tmp_path):
    rows = {"W": torch.randn(7, 3), "count": torch.arange(7), "half": torch.randn(7, 2).bfloat16()}
    shared = {"b_dec": torch.randn(7)}
    write_latent_file(tmp_path / "ours", rows, shared, 7, SINGLE_PROCESS)
    save_file(rows | shared, tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    part = read_latent_file(tmp_path / "theirs", 2, 5, 7)
    assert torch.equal(part["W"], rows["W"][2:5])
    assert torch.equal(part["b_dec"], shared["b_dec"])


def test_a_file_that_cannot_be_written_says_why():
    with pytest.raises(OSError, match="No space left"):
        write_latent_file(Path("/dev/full"), {"W": torch.zeros(1 << 16, 8)}, {}, 1 << 16, SINGLE_PROCESS)
