"""`hf-msae encode` and `hf-msae diff` as a user types them, on the story model."""

import json
from pathlib import Path

import pytest
from datasets import load_dataset

from hf_msae.cli.main import main
from hf_msae.worlds.stories import StoryWorld

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, firing) -> Path:
    """An untrained SAE of the story model, and stories in two files: of the second, all have an owl."""
    folder = tmp_path_factory.mktemp("encode")
    firing.save_pretrained(folder / "sae")
    stories = StoryWorld(seed=7).documents(24)
    (folder / "a.txt").write_text("\n\n".join(stories[:12]))
    (folder / "b.txt").write_text("\n\n".join(f"The owl and the owl saw an owl. {story}" for story in stories[12:]))
    return folder


def run(command: str, *arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([command, *map(str, arguments)])
    return int(caught.value.code or 0)


def test_text_becomes_a_data_set_on_the_hub_and_two_of_them_are_compared(folder, tmp_path, capsys, hub):
    sae = folder / "sae"
    for name in "ab":
        pushing = ("--push-to-hub", f"{hub.user}/latents", "--hub-private") if name == "b" else ()
        assert run("encode", sae, folder / f"{name}.txt", "--output-dir", tmp_path / name, *pushing, "--json") == 0
        index = json.loads(capsys.readouterr().out)
        assert index["num_documents"] == 12
        assert index["base_model"] == "stories"
    rows = load_dataset(f"{hub.user}/latents", split="train")
    assert len(rows) == index["num_tokens"] == sum(shard["num_rows"] for shard in index["shards"])
    assert run("push", tmp_path / "a", f"{hub.user}/others") == 0
    assert len(load_dataset(f"{hub.user}/others", split="train")) > 0
    pushed = b"".join(
        content for name, content in hub.files(f"{hub.user}/others", kind="dataset").items() if "parquet" not in name
    )
    assert str(folder).encode() not in pushed
    capsys.readouterr()
    report = tmp_path / "report"
    assert run("diff", sae, tmp_path / "a", f"{hub.user}/latents", "--output-dir", report, "--json") == 0
    encoded = json.loads(capsys.readouterr().out)
    assert encoded == json.loads((report / "evaluation.json").read_text())
    assert encoded["facts"]["documents_a"] == encoded["facts"]["documents_b"] == 12
    assert run("diff", sae, folder / "a.txt", folder / "b.txt") == 0
    shown = capsys.readouterr().out
    assert "What differs, by level" in shown
    assert "A: 12 documents" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("encode", "{sae}", "{folder}/a.txt", "--output-dir", "{folder}"), "already exists"),
        (("encode", "{sae}", "{folder}/absent.txt", "--output-dir", "{folder}/x"), "cannot find"),
        (("encode", "{sae}", "{folder}/a.txt", "--output-dir", "{folder}/x", "--prefix", "7"), "--prefix 7: the"),
        (("diff", "{sae}", "{folder}/a.txt", "{folder}/a.txt"), "A and B are both"),
        (("diff", "{sae}", "{folder}/a.txt", "{folder}/b.txt", "--prefix", "7"), "--prefix 7: the prefixes of"),
        (("diff", "{sae}", "{folder}/a.txt", "{folder}/b.txt", "--separator", "|"), "has 1 different documents"),
        (("diff", "{sae}", "{folder}/a.txt", "{folder}/absent"), "cannot find"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(folder, capsys, arguments, said):
    given = (argument.format(folder=folder, sae=folder / "sae") for argument in arguments)
    assert run(*given) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith(f"hf-msae {arguments[0]}: ")]
    assert said in line
    assert "Traceback" not in error
