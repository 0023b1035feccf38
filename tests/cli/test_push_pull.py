"""`hf-msae push` and `hf-msae pull` as a user types them, against the Hub on this machine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cli.main import main
from hf_msae.hub.index import list_saes

pytestmark = pytest.mark.slow

REPO = "tester/owls"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def make_sae(layer: int = 1, **changes: Any) -> MatryoshkaSAE:
    torch.manual_seed(layer)
    shape = {"hidden_size": 64, "num_latents": 1024, "prefix_sizes": [64, 1024], "k": 4}
    origin = {"site": f"model.layers.{layer}:output", "base_model": "owner/lm"}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**(shape | origin | changes))).eval()
    sae.calibrate_threshold([torch.randn(500, 64)])
    return sae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_sae().save_pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def pushed(hub) -> str:
    """A repo of two."""
    for layer in (1, 2):
        make_sae(layer).push_to_hub(REPO, subfolder=f"l{layer}")
    return REPO


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Push


def test_push_publishes_and_says_where(hub, folder, capsys):
    assert run("push", str(folder), REPO, "--private", "--commit-message", "Owls") == 0
    info = HfApi().model_info(REPO)
    assert info.private is True
    assert capsys.readouterr().out == f"Pushed {folder}: {hub.endpoint}/{REPO}/commit/{info.sha}\n"
    assert HfApi().list_repo_commits(REPO)[0].title == "Owls"
    assert torch.equal(MatryoshkaSAE.from_pretrained(REPO).W_dec, make_sae().W_dec)


def test_push_takes_a_branch_a_folder_and_a_pull_request(hub, folder, capsys):
    assert run("push", str(folder), REPO, "--subfolder", "a", "--revision", "wide") == 0
    assert [entry.subfolder for entry in list_saes(REPO, revision="wide")] == ["a"]
    assert run("push", "--create-pr", "--", str(folder), REPO) == 0
    assert f"{hub.endpoint}/{REPO}/discussions/1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("absent", REPO), "There is no folder absent to push"),
        (("{folder}", "a/b/c"), "is not the id of a Hub repo"),
        (("{folder}/..", "datasets/a/b"), "SAEs go to model repos"),
    ],
)
def test_push_refuses_in_one_line(hub, folder, capsys, arguments, said):
    assert run("push", *(argument.format(folder=folder) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-msae push: ")
    assert said in error
    assert "Traceback" not in error


def test_push_needs_both_places(hub, folder, capsys):
    assert run("push", str(folder)) == 2
    assert "required: REPO" in capsys.readouterr().err


# Pull


def test_pull_brings_what_was_pushed(hub, pushed, tmp_path, capsys):
    target = tmp_path / "here"
    assert run("pull", REPO, str(target)) == 0
    files = {name: content for name, content in hub.files(REPO).items() if name != ".gitattributes"}
    assert contents(target) == files
    for layer in (1, 2):
        assert torch.equal(MatryoshkaSAE.from_pretrained(target / f"l{layer}").W_dec, make_sae(layer).W_dec)
    size = (target / "l1" / "model.safetensors").stat().st_size / 1e6
    assert capsys.readouterr().out.splitlines()[0] == (
        f"{target / 'l1'}: all latents of {REPO}/l1 at model.layers.1:output, {size:.1f} of {size:.1f} MB"
    )


def test_pull_makes_a_folder_of_the_repos_name(hub, pushed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("pull", REPO, "--subfolder", "l2") == 0
    assert torch.equal(MatryoshkaSAE.from_pretrained("owls").W_dec, make_sae(2).W_dec)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["owls"]
    assert not (tmp_path / "owls" / "sae_index.json").exists()


def test_pull_takes_some_sites(hub, pushed, tmp_path):
    assert run("pull", REPO, str(tmp_path / "here"), "--sites", "layers.2") == 0
    assert [entry.subfolder for entry in list_saes(tmp_path / "here")] == ["l2"]
    assert torch.equal(MatryoshkaSAE.from_pretrained(tmp_path / "here", subfolder="l2").W_dec, make_sae(2).W_dec)


def test_pull_takes_the_first_latents(hub, pushed, tmp_path, capsys):
    target = tmp_path / "here"
    assert run("pull", REPO, str(target), "--subfolder", "l1", "--prefix", "64") == 0
    sae, whole = MatryoshkaSAE.from_pretrained(target), make_sae(1)
    x = torch.randn(5, 64)
    assert torch.equal(sae.encode(x), whole.encode(x)[:, :64])
    assert sae.config.prefix_sizes == [64]
    out = capsys.readouterr().out
    assert f"{target}: 64 of 1,024 latents of {REPO}/l1 at model.layers.1:output, 0.0 of 0.5 MB" in out
    card = (target / "README.md").read_text()
    assert f'MatryoshkaSAE.from_pretrained("{target}")' in card
    assert f"These are the first 64 latents of `{REPO}/l1`" in card


def test_the_first_latents_of_several_keep_their_folders(hub, pushed, tmp_path):
    assert run("pull", REPO, str(tmp_path / "here"), "--prefix", "64") == 0
    assert [(entry.subfolder, entry.num_latents) for entry in list_saes(tmp_path / "here")] == [("l1", 64), ("l2", 64)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tester/absent",), "no folder and no Hub repo tester/absent"),
        ((REPO, "--revision", "v2"), "has no revision 'v2'"),
        ((REPO, "--subfolder", "l3"), "has no SAE in 'l3'; there are: l1, l2"),
        ((REPO, "--sites", "layers.7"), "reads the site 'layers.7'"),
        ((REPO, "--prefix", "2_000"), "prefix must be from 1 to 1024"),
    ],
)
def test_pull_refuses_in_one_line_and_leaves_nothing(hub, pushed, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert run("pull", *arguments) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_pull_does_not_write_over_a_folder(hub, pushed, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert run("pull", REPO, str(tmp_path)) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert contents(tmp_path) == {"mine.txt": b"mine"}


@pytest.mark.parametrize("prefix", [(), ("--prefix", "64")])
def test_a_download_that_breaks_off_leaves_nothing(hub, pushed, tmp_path, prefix):
    hub.fail(r"GET /.*(large|model\.safetensors)", status=403, times=100)
    assert run("pull", REPO, str(tmp_path / "here"), *prefix) != 0
    assert list(tmp_path.iterdir()) == []
    hub.faults.clear()
    assert run("pull", REPO, str(tmp_path / "here"), *prefix) == 0
    assert len(list_saes(tmp_path / "here")) == 2
