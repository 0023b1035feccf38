"""Links in folders that are pushed from or pulled into: none publishes a file of this machine, or writes elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig, list_saes
from hf_msae.cli.main import main
from hf_msae.errors import HfMsaeError
from hf_msae.hub import pull, push_folder

pytestmark = pytest.mark.slow

REPO = "tester/sae"
SECRET = "a password of this machine"
# JSON that each reader would take, so that nothing but the link stands in the way.
CONTENTS = {
    "README.md": SECRET,
    "modeling_matryoshka_sae.py": f"# {SECRET}",
    "training_arguments.json": json.dumps({"password": SECRET}),
    "training_log.jsonl": json.dumps({"step": 1, "tokens": 1, "note": SECRET}),
    "metrics.json": json.dumps({"note": SECRET}),
}


def make_sae() -> MatryoshkaSAE:
    torch.manual_seed(0)
    config = MatryoshkaSAEConfig(
        hidden_size=8, num_latents=32, prefix_sizes=[8, 32], k=4, site="model.layers.1:output"
    )
    config.measured = {"tokens": 10, "l0": [1.0, 2.0], "fve": [0.1, 0.2]}
    return MatryoshkaSAE(config).eval()


def save_run(folder: Path) -> Path:
    """An SAE's folder with what a run leaves beside it."""
    make_sae().save_pretrained(folder)
    levels = [{"prefix": size, "l0": 1.0, "fve": fve, "dead": 0.0} for size, fve in ((8, 0.1), (32, 0.2))]
    facts: dict[str, Any] = {
        "dataset": "d",
        "training_tokens": 1,
        "steps": 1,
        "learning_rate": 1.0,
        "tokens_per_second": 1.0,
    }
    facts["versions"] = {"torch": "2.6", "transformers": "5.10"}
    (folder / "metrics.json").write_text(json.dumps({"tokens": 10, "levels": levels} | facts))
    (folder / "training_arguments.json").write_text("{}")
    (folder / "training_log.jsonl").write_text("")
    return folder


def link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def published(hub) -> bytes:
    return b"".join(hub.files(REPO).values()) if REPO in hub.repos else b""


@pytest.mark.parametrize("how", ["folder", "grid", "sae"])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_link_out_of_the_folder_is_named_and_nothing_is_published(hub, tmp_path, name, how):
    outside = tmp_path / "elsewhere" / name
    outside.parent.mkdir()
    outside.write_text(CONTENTS[name])
    folder = save_run(tmp_path / "run" / ("one" if how == "grid" else ""))
    if how == "grid":
        save_run(tmp_path / "run" / "two")
    sae = MatryoshkaSAE.from_pretrained(folder)
    if how == "sae" and name.endswith(".py"):
        pytest.skip("an SAE in memory brings code of its own")
    link(folder / name, outside)
    with pytest.raises(HfMsaeError, match=rf"{name} is a link to {outside}, outside of .*not published"):
        sae.push_to_hub(REPO) if how == "sae" else push_folder(tmp_path / "run", REPO)
    assert SECRET.encode() not in published(hub)


def test_the_log_of_a_grid_lies_above_its_saes(hub, tmp_path):
    (tmp_path / "log").write_text(json.dumps({"sae": "one", "step": 1, "tokens": 1, "note": SECRET}) + "\n")
    folder = save_run(tmp_path / "run" / "one")
    (folder / "training_log.jsonl").unlink()
    link(tmp_path / "run" / "training_log.jsonl", tmp_path / "log")
    with pytest.raises(HfMsaeError, match=r"training_log\.jsonl is a link"):
        push_folder(tmp_path / "run", REPO)
    assert SECRET.encode() not in published(hub)


@pytest.mark.parametrize("kind", ["dangling", "loop"])
def test_links_that_lead_nowhere_are_no_files(hub, tmp_path, kind):
    folder = save_run(tmp_path / "run")
    link(folder / "README.md", tmp_path / "absent" if kind == "dangling" else folder / "README.md")
    if kind == "dangling":
        with pytest.raises(HfMsaeError, match=r"README\.md is a link to .*absent"):
            push_folder(folder, REPO)
    else:
        push_folder(folder, REPO)
        assert b"hf_msae:begin" in hub.files(REPO)["README.md"]


def test_links_inside_the_folder_and_of_weights_on_another_disk_are_followed(hub, tmp_path):
    folder = save_run(tmp_path / "run" / "one")
    shared, big = tmp_path / "run" / "shared.md", tmp_path / "big.safetensors"
    shared.write_text("My own words.")
    link(folder / "README.md", shared)
    (folder / "model.safetensors").rename(big)
    link(folder / "model.safetensors", big)
    push_folder(tmp_path / "run", REPO)
    assert b"My own words." in hub.files(REPO)["one/README.md"]
    assert torch.equal(MatryoshkaSAE.from_pretrained(REPO, subfolder="one").W_enc, make_sae().W_enc)


def test_a_snapshot_of_the_hubs_cache_is_pushed_on(hub, tmp_path):
    """Its files are links to blobs beside it."""
    push_folder(save_run(tmp_path / "run"), REPO)
    snapshot = Path(snapshot_download(REPO))
    assert (snapshot / "config.json").is_symlink()
    push_folder(snapshot, "tester/copy")
    ours, theirs = hub.files(REPO), hub.files("tester/copy")
    assert {name for name in ours if ours[name] == theirs.get(name)} >= {"config.json", "model.safetensors"}


def test_a_snapshot_leads_to_blobs_of_its_own_repo_only(tmp_path):
    folder = save_run(tmp_path / "snapshots" / "clone")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "secret").write_text(SECRET)
    link(folder / "README.md", tmp_path / "secret")
    with pytest.raises(HfMsaeError, match=r"README\.md is a link"):
        push_folder(folder, REPO, token="t")


def test_an_interpretation_is_pushed_without_links_and_strangers(hub, tmp_path, known):
    from hf_msae.interpret import interpret

    folder = tmp_path / "pages"
    made = interpret(known.model, known.tokenizer, known.sae, known.texts[:20], folder, max_tokens=200, packing=False)
    known.sae.push_to_hub(REPO)
    (folder / "notes.txt").write_text(SECRET)
    made.push(REPO)
    assert "interpretation/interpretation.json" in hub.files(REPO)
    assert SECRET.encode() not in published(hub)
    (tmp_path / "labels.json").write_text(json.dumps({"0": {"text": SECRET}}))
    link(folder / "labels.json", tmp_path / "labels.json")
    with pytest.raises(HfMsaeError, match=r"labels\.json is a link"):
        made.push(REPO)
    assert SECRET.encode() not in published(hub)


# What is listed, and where a pull writes


def test_links_to_folders_are_not_followed_and_said_so(tmp_path):
    make_sae().save_pretrained(tmp_path / "elsewhere" / "sae")
    folder = tmp_path / "picked"
    folder.mkdir()
    (folder / "best").symlink_to(tmp_path / "elsewhere" / "sae")
    (folder / "above").symlink_to(tmp_path)
    with pytest.raises(HfMsaeError, match=r"It holds nothing\. Links to folders are not followed: above, best"):
        list_saes(folder)
    # One that is named is what it leads to.
    assert [entry.num_latents for entry in list_saes(folder / "best")] == [32]
    assert [entry.subfolder for entry in list_saes(folder / "above")] == ["elsewhere/sae"]


@pytest.mark.parametrize("prefix", [None, 8])
@pytest.mark.parametrize("leads_to", ["an empty folder", "nothing yet"])
def test_a_pull_into_a_link_writes_where_it_leads(hub, tmp_path, leads_to, prefix):
    make_sae().push_to_hub(REPO)
    target = tmp_path / "big disk" / "sae"
    target.parent.mkdir()
    if leads_to == "an empty folder":
        target.mkdir()
    (tmp_path / "dest").symlink_to(target)
    pull(REPO, tmp_path / "dest", prefix=prefix)
    assert (tmp_path / "dest").is_symlink()
    assert MatryoshkaSAE.from_pretrained(target).config.num_latents == (prefix or 32)
    assert not any(path.is_symlink() for path in target.rglob("*"))


@pytest.mark.parametrize("leads_to", ["a full folder", "a file", "itself"])
def test_a_pull_into_another_link_is_refused_in_words(hub, tmp_path, leads_to, capsys):
    make_sae().push_to_hub(REPO)
    dest, target = tmp_path / "dest", tmp_path / "target"
    if leads_to == "a full folder":
        target.mkdir()
        (target / "mine").write_text("mine")
    elif leads_to == "a file":
        target.write_text("mine")
    dest.symlink_to(dest if leads_to == "itself" else target)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exited:
        main(["pull", REPO, str(dest)])
    assert exited.value.code == 2
    assert "dest" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
