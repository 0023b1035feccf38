"""`hf-msae train --dry-run` and `--init-from`, as a user types them."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_msae import MatryoshkaSAE
from hf_msae.cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lm, tokenizer, texts) -> Path:
    """A model and a text file on disk."""
    folder = tmp_path_factory.mktemp("cli")
    lm.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    (folder / "texts.txt").write_text("\n\n".join(texts))
    return folder


def run(folder: Path, output: Path, *more: str) -> int:
    arguments = [
        "train", "--model", str(folder / "lm"), "--dataset", str(folder / "texts.txt"), "--batch-size", "64",
        "--block-tokens", "300", "--eval-tokens", "400", "--calibration-tokens", "200", "--ce-tokens", "0",
        "--context-length", "32", "--use-cpu", "--disable-tqdm", "--output-dir", str(output), *more,
    ]  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


SMALL = ["--site", "layers.0", "--num-latents", "64", "--prefix-sizes", "8", "64", "--k", "4"]


def test_a_dry_run_says_everything_and_writes_nothing(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out", *SMALL, "--max-tokens", "1_280", "--dry-run") == 0
    text = capsys.readouterr().out
    for words in (
        "steps",
        "1,280 (64 a step)",
        "optimizer",
        "activation buffers",
        "expected peak on cpu",
        "disk in all",
    ):
        assert words in text
    assert re.search(r"[\d,]+ tokens/s \([\d,]+ through the language model, [\d,]+ in steps\): about \d", text)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_leaves_what_another_run_left(folder, tmp_path):
    arguments = (folder, tmp_path / "out", *SMALL, "--max-steps", "3")
    assert run(*arguments) == 0
    assert run(*arguments, "--overwrite-output-dir", "--dry-run") == 0
    assert (tmp_path / "out" / "metrics.json").is_file()


def test_a_run_that_does_not_fit_is_refused_by_a_dry_run(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out", *SMALL, "--max-tokens", "1T", "--block-tokens", "1T", "--dry-run") == 1
    text = capsys.readouterr().out
    assert "Lower block_tokens" in text
    assert "tokens/s" not in text


def test_init_from_takes_the_form_and_the_weights_of_what_is_there(folder, tmp_path, capsys):
    first, same, wide = (tmp_path / name for name in ("first", "same", "wide"))
    assert run(folder, first, *SMALL, "--max-steps", "20") == 0
    assert run(folder, same, "--init-from", str(first), "--max-steps", "1", "--learning-rate", "1e-9") == 0
    ours, theirs = load_file(first / "model.safetensors"), load_file(same / "model.safetensors")
    assert torch.allclose(ours["W_dec"], theirs["W_dec"], atol=1e-5)
    assert torch.allclose(ours["W_enc"], theirs["W_enc"], atol=1e-5)
    assert run(folder, wide, "--init-from", str(first), "--num-latents", "96", "--max-steps", "1") == 0
    config = MatryoshkaSAE.from_pretrained(wide).config
    assert (config.prefix_sizes, config.k, config.site) == ([8, 64, 96], 4, "model.layers.0:output")
    capsys.readouterr()
    assert run(folder, tmp_path / "bad", "--init-from", str(first), "--site", "layers.1", "--max-steps", "1") == 2
    assert "its site is model.layers.0:output" in capsys.readouterr().err
    assert run(folder, tmp_path / "bad", "--init-from", str(tmp_path / "nowhere"), "--max-steps", "1") == 2
    assert "Cannot begin with" in capsys.readouterr().err
