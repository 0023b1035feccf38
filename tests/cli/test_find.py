"""`hf-msae find` as a user types it, on the story model, without a network."""

import json
import re
from pathlib import Path

import pytest

from hf_msae import load_steering
from hf_msae.cli.main import main
from hf_msae.worlds.stories import StoryWorld, word_concepts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, firing) -> Path:
    """An untrained SAE of the story model, with examples beside it: stories with birds and stories without."""
    folder = tmp_path_factory.mktemp("find")
    firing.save_pretrained(folder / "sae")
    world = StoryWorld(seed=7)
    sides: dict[bool, list[str]] = {True: [], False: []}
    for index in range(120):
        text = world.story(index).text
        sides[any("animal" in word_concepts(word) for word in re.findall("[A-Za-z]+", text))].append(text)
    for name, has in (("a.txt", True), ("b.txt", False)):
        (folder / name).write_text("\n\n".join(sides[has][:24]))
    return folder


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(("find", *arguments))
    return int(caught.value.code or 0)


def flags(folder: Path) -> tuple[str, ...]:
    short = ("--context-length", "48", "--num-candidates", "5", "--neutral-tokens", "120", "--max-latents", "2")
    return str(folder / "sae"), "--positive", str(folder / "a.txt"), "--negative", str(folder / "b.txt"), *short


def test_a_steering_is_found_saved_and_used(folder, capsys):
    assert run(*flags(folder), "--words", "owl", "robin", "--name", "birds", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["saved"] == str(folder / "sae")
    assert [token.strip() for token in printed["tokens"]] == ["owl", "robin"]
    assert printed["facts"]["positive"] == printed["facts"]["negative"] == 24
    names = [row["name"] for row in printed["rows"]]
    assert names[0] == "few latents"
    assert {"DiffMean of all tokens", "probe", "4 random latents, each alone"} <= set(names)
    steering = load_steering(folder / "sae", "birds")
    assert steering.to_dict() == printed["steering"]
    with pytest.raises(SystemExit, match="0"):
        main(("steer", str(folder / "sae"), "--steering", "birds", "--prompt", "Once", "--max-new-tokens", "4"))
    assert run(*flags(folder), "--words", "owl", "--name", "unsaved", "--no-save") == 0
    shown = capsys.readouterr().out
    assert "24 positive and 24 negative examples, half of them held out. Typical tokens: owl" in shown
    assert "How well each level tells the concept" in shown
    assert "Saved" not in shown
    assert run(*flags(folder), "--words", "owl", "--name", "x", "--subfolder", "absent") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--words", "zebrafish"), "'zebrafish' is no token of the model"),
        (("--positive", "{folder}/absent.txt"), "absent.txt"),
        (("--positive", "{folder}/b.txt"), "positive and negative at once"),
        (("--positive", "{folder}/b.txt", "--separator", "|"), "Positive examples: 1 different examples were given"),
        (("--max-latents", "9"), "max_latents must be 1 to 5, got 9"),
        (("--site", "layers.9"), "layers, so no 'layers.9'"),
        (("--model", "./absent"), "There is no model at ./absent"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(folder, capsys, arguments, said):
    assert run(*flags(folder), *(argument.format(folder=folder) for argument in arguments)) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("hf-msae find: ")]
    assert said in line
    assert "Traceback" not in error


def test_beside_a_repo_nothing_is_saved(folder, capsys):
    assert run("someone/sae", *flags(folder)[1:]) == 2
    assert "fetch it with `hf-msae pull` and name the folder, or give --no-save" in capsys.readouterr().err
