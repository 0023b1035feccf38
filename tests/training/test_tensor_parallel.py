"""A language model of which each process has a part: the run is that of one process with the whole model.

Real processes over gloo, through the command line. All go through one order of tokens, so losses and weights must be
those of one process with the same batch, whether each has a part of the batch or of the latents.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel
from warm_processes import run_command

from hf_msae.training.loaders import is_tensor_parallel

pytestmark = pytest.mark.slow

STEPS = 30
LAYOUTS = {"parts of the batch": [], "parts of the latents": ["--shard-latents"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lm, tokenizer) -> Path:
    """The random LM and 900 documents of its words."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    lm.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    words = torch.randint(60, (900, 20), generator=torch.Generator().manual_seed(3)).tolist()
    (folder / "texts.txt").write_text("\n\n".join(" ".join(f"w{word}" for word in line) for line in words))
    return folder


def train(folder: Path, name: str, *options: str, processes: int = 1) -> tuple[int, str]:
    """The status of `hf-msae train`, and what was written."""
    batch = str(128 // processes)
    arguments = ["--model", str(folder / "lm"), "--dataset", str(folder / "texts.txt"), "--site", "layers.0"]
    arguments += ["--num-latents", "64", "--prefix-sizes", "8", "64", "--k", "4", "--batch-size", batch, "--use-cpu"]
    arguments += ["--max-steps", str(STEPS), "--save-steps", "10", "--logging-steps", "10", "--context-length", "32"]
    arguments += ["--eval-tokens", "500", "--calibration-tokens", "500", "--ce-tokens", "300", "--disable-tqdm"]
    arguments += ["--block-tokens", "1000", "--output-dir", str(folder / name), *options]
    return run_command(processes, ["train", *arguments], folder / f"{name}.output")


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    status, written = train(folder, "whole")
    assert status == 0, written
    return folder / "whole"


def assert_same(one: Path, other: Path) -> None:
    logs = [
        [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()] for run in (one, other)
    ]
    assert [line["step"] for line in logs[0]] == [10, 20, 30]
    for mine, its in zip(*logs, strict=True):
        assert mine["tokens"] == its["tokens"]
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-4)
    mine, its = (load_file(run / "model.safetensors") for run in (one, other))
    for name in its:
        torch.testing.assert_close(mine[name], its[name], rtol=1e-3, atol=1e-3)
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (one, other)]
    assert metrics[0]["ce_tokens"] == metrics[1]["ce_tokens"] > 0
    for level, other_level in zip(metrics[0]["levels"], metrics[1]["levels"], strict=True):
        assert level["fve"] == pytest.approx(other_level["fve"], abs=1e-3)
        assert level["ce_increase"] == pytest.approx(other_level["ce_increase"], abs=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_run_is_that_of_one_process_and_goes_on_there(folder, whole, layout):
    name = layout.replace(" ", "-")
    status, written = train(folder, name, "--tensor-parallel", *LAYOUTS[layout], processes=2)
    assert status == 0, written
    assert_same(folder / name, whole)
    shutil.rmtree(folder / name / "checkpoint-30")
    status, written = train(folder, name, "--resume-from-checkpoint")
    assert status == 0, written
    assert_same(folder / name, whole)


def test_one_process_has_nothing_to_split(folder):
    status, written = train(folder, "one", "--tensor-parallel")
    assert status != 0
    assert "splits the language model over the processes of the run, and there is one" in written
    assert not (folder / "one").exists()


def test_a_model_without_a_plan_is_refused(folder, tokenizer):
    GPT2LMHeadModel(GPT2Config(vocab_size=80, n_embd=16, n_layer=2, n_head=2, n_positions=64)).save_pretrained(
        folder / "gpt2"
    )
    tokenizer.save_pretrained(folder / "gpt2")
    status, written = train(folder, "refused", "--model", str(folder / "gpt2"), "--tensor-parallel", processes=2)
    assert status != 0
    assert "transformers has no tensor parallel plan for gpt2" in written


def test_a_model_split_over_some_of_the_processes_is_refused(lm):
    assert is_tensor_parallel(lm, 4) is False
    lm._tp_size = 2
    try:
        assert is_tensor_parallel(lm, 2) is True
        with pytest.raises(ValueError, match="split over 2 processes, and the run has 4"):
            is_tensor_parallel(lm, 4)
    finally:
        lm._tp_size = None
