"""`hf-msae steer-eval` as a user types it, on the story model, without a network."""

import json
from pathlib import Path

import pytest

from hf_msae.cli.main import main
from hf_msae.concepts.steer_report import read_steering_report
from hf_msae.worlds.stories import StoryWorld

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, firing) -> Path:
    """An untrained SAE of the story model, with a concept, a few stories and prompts beside it."""
    folder = tmp_path_factory.mktemp("steer-eval")
    firing.save_pretrained(folder / "sae")
    concepts = [{"name": "she", "words": ["she", "her"]}, {"name": "zebras", "words": ["zebra"]}]
    (folder / "concepts.jsonl").write_text("\n".join(map(json.dumps, concepts)))
    world = StoryWorld(seed=7)
    (folder / "stories.txt").write_text("\n\n".join(world.story(index).text for index in range(80)))
    (folder / "prompts.txt").write_text("Once upon a time\nIt was a cold day\n\n")
    return folder


def run(folder: Path, *arguments: str) -> int:
    given = (
        str(folder / "sae"),
        "--concepts",
        str(folder / "concepts.jsonl"),
        "--dataset",
        str(folder / "stories.txt"),
    )
    with pytest.raises(SystemExit) as caught:
        main(("steer-eval", *given, *arguments))
    return int(caught.value.code or 0)


def test_a_table_and_a_report_are_made(folder, tmp_path, capsys):
    short = ("--neutral-tokens", "120", "--max-new-tokens", "5", "--strengths", "0.5", "1")
    methods = ("--methods", "few latents", "DiffMean", "nothing")
    prompts = ("--prompts", str(folder / "prompts.txt"))
    assert run(folder, *short, *methods, *prompts, "--output-dir", str(tmp_path / "report"), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert [result["method"] for result in printed["results"]] == ["few latents", "DiffMean", "nothing"]
    assert {result["concept"] for result in printed["results"]} == {"she"}
    assert printed["facts"]["prompts"] == 2
    assert "Positive examples" in printed["skipped"]["zebras"]
    assert "<svg" in (tmp_path / "report" / "report.html").read_text()
    # The same again measures nothing again, whatever else is in the folder.
    written = (tmp_path / "report" / "evaluation.json").read_bytes()
    assert run(folder, *short, *methods, *prompts, "--output-dir", str(tmp_path / "report"), "--json") == 0
    assert json.loads(capsys.readouterr().out) == printed
    assert (tmp_path / "report" / "evaluation.json").read_bytes() == written
    for damaged in (b"{}", b"no JSON", b'{"results": [1], "latents": {}}'):
        (tmp_path / "report" / "evaluation.json").write_bytes(damaged)
        assert read_steering_report(tmp_path / "report") is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--concepts", "absent.jsonl"), "absent.jsonl is no such file"),
        (("--methods", "magic"), "got magic"),
        (("--prompts", "absent.txt"), "--prompts absent.txt is no file"),
        (("--num-prompts", "1"), "two different ones are needed"),
        (("--judge-url", "http://127.0.0.1:9"), "--judge-url needs --judge-model"),
        (("--judge-model", "stories"), "A judge must be a chat model"),
        (("--strengths", "-1"), "finite numbers above 0"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(folder, capsys, arguments, said):
    assert run(folder, *arguments) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("hf-msae steer-eval: ")]
    assert said in line
    assert "Traceback" not in error
