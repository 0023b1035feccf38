"""`hf-msae meta` as a user types it."""

import json
from pathlib import Path

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cli.main import main
from hf_msae.research.meta import is_meta_sae

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lm, tokenizer, texts) -> Path:
    """A language model, a text file and an SAE on disk."""
    folder = tmp_path_factory.mktemp("meta")
    lm.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    (folder / "texts.txt").write_text("\n\n".join(texts))
    torch.manual_seed(0)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=16, num_latents=64, k=4, site="layers.0", context_length=32))
    sae.firing_rate.fill_(0.1)
    sae.save_pretrained(folder / "sae")
    return folder


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def command(folder: Path, *more: str) -> list[str]:
    return [
        "meta", str(folder / "sae"), "--model", str(folder / "lm"), "--dataset", str(folder / "texts.txt"),
        "--num-latents", "12", "--k", "3", "--max-steps", "40", "--label-tokens", "300", "--use-cpu", *more,
    ]  # fmt: skip


def test_meta_trains_prints_and_saves(folder, tmp_path, capsys):
    assert run(*command(folder, "--output-dir", str(tmp_path / "out"), "--show", "3")) == 0
    text = capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "meta_sae.json").read_text())
    assert (facts["rows"], facts["meta-latents"], facts["k"]) == (64, 12, 3)
    assert f"12 meta-latents, {facts['L0']:.2f} per latent, explain {facts['explained']:.1%}" in text
    assert f"random directions: {facts['explained of random rows']:.1%}" in text
    assert text.count("cosine 0.") == 3
    assert text.count("meta-latent ") >= 6
    meta = MatryoshkaSAE.from_pretrained(tmp_path / "out")
    assert is_meta_sae(meta)
    assert meta.config.measured["meta_sae_of"] == str(folder / "sae")
    assert '"latents":{"0":' in (tmp_path / "out" / "decompositions.html").read_text()

    # A program reads the same.
    options = ["--meta-sae", str(tmp_path / "out"), "--latents", "7", "9", "--json"]
    assert run(*command(folder, *options)) == 0
    read = json.loads(capsys.readouterr().out)
    assert read.items() >= facts.items()
    assert [item["latent"] for item in read["latents"]] == [7, 9]
    assert all(item["name"] for item in read["latents"])
    assert all(part["activation"] > 0 for item in read["latents"] for part in item["parts"])

    # What was trained can be looked at again, and is not overwritten.
    assert run(*command(folder, "--meta-sae", str(tmp_path / "out"), "--latents", "7", "9")) == 0
    again = capsys.readouterr().out
    assert "latent 7 " in again
    assert "latent 9 " in again
    assert "explain" not in again
    assert run(*command(folder, "--output-dir", str(tmp_path / "out"))) == 2
    assert "exists already; give another --output-dir" in capsys.readouterr().err


def test_no_language_model_is_needed_where_nothing_is_named(folder, tmp_path, capsys):
    arguments = ["meta", str(folder / "sae"), "--model", "/nowhere", "--label-tokens", "0", "--max-steps", "3"]
    assert run(*arguments, "--no-random-control", "--use-cpu", "--output-dir", str(tmp_path / "out")) == 0
    assert "16 meta-latents" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "meta_sae.json").read_text())["explained of random rows"] is None


def test_what_does_not_fit_is_said_in_words_and_leaves_nothing(folder, tmp_path, capsys):
    out = tmp_path / "out"
    for more, words in (
        (["--num-latents", "64"], "could store each of the 64 decoder rows by itself; give fewer, such as 16"),
        (["--latents", "64"], "there are latents 0 to 63; got [64]"),
        (["--meta-sae", str(folder / "sae")], "is an SAE of activations, not a meta-SAE"),
    ):
        assert run(*command(folder, "--output-dir", str(out), *more)) == 2
        assert words in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
