"""`hf-msae export-steering` as a user types it, on the story model, without a network."""

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_msae import MatryoshkaSAE
from hf_msae.cli.main import main
from hf_msae.steering import LatentEdit, Steering, constant_shifts, save_steering
from hf_msae.worlds.stories import load_story_lm, story_lm_path

pytestmark = pytest.mark.slow

STEERING = Steering([LatentEdit(12, 2.0), LatentEdit(40, -1.0)], name="owls")


@pytest.fixture
def folder(untrained: Path) -> Path:
    """With two saved steerings, one of which is no constant shift."""
    save_steering(STEERING, untrained)
    save_steering(Steering([LatentEdit(7, 1.0, "clamp")], name="clamped"), untrained)
    return untrained


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(("export-steering", *arguments))
    return int(caught.value.code or 0)


def test_a_model_that_transformers_alone_loads(folder, capsys):
    out = folder.parent / "steered"
    assert run(str(folder), "--steering", "owls", "--to", "model", "--output", str(out)) == 0
    said = capsys.readouterr().out
    assert f"Wrote the steering 'owls' to {out}" in said
    assert "special tokens and outliers" in said
    assert f"AutoModelForCausalLM.from_pretrained('{out}')" in said
    model, tokenizer = load_story_lm()
    sae = MatryoshkaSAE.from_pretrained(folder)
    inputs = tokenizer("Once upon a time, there was a", return_tensors="pt")
    with torch.no_grad(), STEERING.on(model, sae, special_ids=()):
        expected = model(**inputs).logits
    found = AutoModelForCausalLM.from_pretrained(out).eval()(**inputs).logits
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(out)("owl").input_ids == tokenizer("owl").input_ids


def test_files_for_other_programs(folder, capsys):
    vector, file = folder.parent / "owls.gguf", folder.parent / "owls.pt"
    given = (str(folder), "--steering", "owls")
    assert run(*given, "--to", "gguf", "--output", str(vector)) == 0
    assert f"llama-cli -m MODEL.gguf --control-vector {vector}" in capsys.readouterr().out
    assert run(*given, "--to", "lm-eval", "--output", str(file)) == 0
    assert f"pretrained={story_lm_path()},steer_path={file}" in capsys.readouterr().out
    model, _ = load_story_lm()
    (shift,) = constant_shifts(model, MatryoshkaSAE.from_pretrained(folder), STEERING).values()
    directions = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(vector).tensors}
    assert list(directions) == ["direction.1", "direction.2", "direction.3", "direction.4"]
    assert torch.equal(directions["direction.2"], shift)
    assert torch.equal(torch.load(file, weights_only=True)["layers.2"]["steering_vector"], shift)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--to", "model", "--output", "x"),
            "has several steerings, so a name is needed; there are 'owls', 'clamped'",
        ),
        (("--to", "gguf", "--output", "x", "--steering", "cats"), "has no steering 'cats'"),
        (
            ("--to", "model", "--output", "x", "--steering", "clamped"),
            "method='clamp' of latent 7 adds depends on the",
        ),
        (("--to", "lm-eval", "--output", "x", "--steering", "owls"), "from .pt or .pth files, got x"),
        (("--to", "gguf", "--output", ".", "--steering", "owls"), ". exists; name another output"),
        (
            ("--to", "gguf", "--output", "x", "--steering", "owls", "--model", "./absent"),
            "There is no model at ./absent",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(folder, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(folder.parent)
    assert run(str(folder), *arguments) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("hf-msae export-steering: ")]
    assert said in line
    assert "Traceback" not in error
    assert [path.name for path in folder.parent.iterdir()] == ["sae"]
