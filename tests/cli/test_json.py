"""`--json`: one object on standard output, and nothing beside it, with the numbers that are in the files."""

import json
from pathlib import Path

import pytest

from hf_msae.cli.main import main

pytestmark = pytest.mark.slow

TRAIN = [
    "train", "--num-latents", "64", "--prefix-sizes", "16", "64", "--k", "4", "--batch-size", "256",
    "--max-tokens", "2k", "--block-tokens", "2k", "--eval-tokens", "600", "--calibration-tokens", "400",
    "--ce-tokens", "300", "--disable-tqdm", "--save-steps", "0",
]  # fmt: skip


def printed(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    """What a command prints, as the object that it must be."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert caught.value.code in (0, None), captured.err
    found = json.loads(captured.out)
    assert isinstance(found, dict)
    return found


def test_a_program_can_read_what_every_command_finds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sae = str(tmp_path / "sae")
    plan = printed(capsys, *TRAIN, "--output-dir", sae, "--dry-run")
    assert plan["fits"] is True
    assert not Path(sae).exists()
    trained = printed(capsys, *TRAIN, "--output-dir", sae)
    (measured,) = trained["saes"].values()
    assert measured["folder"] == trained["output_dir"] == sae
    saved = json.loads((tmp_path / "sae" / "metrics.json").read_text())
    assert [level["fve"] for level in measured["levels"]] == [level["fve"] for level in saved["levels"]]
    pages = printed(capsys, "interpret", sae, "--max-tokens", "1000")
    assert len(pages["names"]) == len(pages["density"]) == 64
    assert Path(pages["folder"]).is_dir()
    tree = printed(capsys, "tree", sae, "--output", str(tmp_path / "tree.json"))
    assert tree["edges"] == json.loads((tmp_path / "tree.json").read_text())["edges"]
    assert tree["names"] == pages["names"]
    steered = printed(capsys, "steer", sae, "--prompt", "Once", "--latent", "1=1", "--max-new-tokens", "3")
    (text,) = steered["texts"]
    assert text["default"].startswith("Once")
    assert text["steered"].startswith("Once")
    output = ["--output-dir", str(tmp_path / "evaluation"), "--eval-tokens", "600", "--metrics", "geometry"]
    numbers = printed(capsys, "eval", sae, *output, "--stories", "0", "--baselines", "none")
    assert numbers["geometry"] == json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["geometry"]


def test_a_toy_prints_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    few = ["--variants", "fixed", "--seeds", "1", "--steps", "3", "--output-dir", str(tmp_path)]
    assert printed(capsys, "toy", *few) == json.loads((tmp_path / "recovery.json").read_text())
