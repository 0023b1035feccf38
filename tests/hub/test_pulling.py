"""What is fetched from a repo is what belongs to an SAE, and lies below the folder that was named."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.hub.index import INDEX_NAME, NoSAEError, list_saes, load_saes
from hf_msae.hub.publishing import push_folder
from hf_msae.hub.pulling import pull
from hf_msae.hub.results import CODE_NAMES
from hf_msae.hub.retrying import PublishError

pytestmark = pytest.mark.slow

REPO = "tester/sae"
STRANGERS = [
    *("torch.py", "sitecustomize.py", "usercustomize.py", "conftest.py", "hf_msae.py", "setup.py", "__init__.py"),
    *("-rf", "--help", ".bashrc", ".env", "run.sh", "Makefile", "pyproject.toml", "torch.so", "x.pth", "page.html"),
    *(
        "pytorch_model.bin",
        "ae.pt",
        "modeling.pyc",
        "model.safetensors.py",
        "model-1-of-2.safetensors",
        "config.json.sh",
    ),
]


def make_sae(seed: int = 0) -> MatryoshkaSAE:
    torch.manual_seed(seed)
    config = MatryoshkaSAEConfig(
        hidden_size=8, num_latents=32, prefix_sizes=[8, 32], k=4, site=f"model.layers.{seed}:output", base_model="a/lm"
    )
    return MatryoshkaSAE(config).eval()


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("subfolder", ["", "layers.1"])
@pytest.mark.parametrize("prefix", [None, 8])
def test_only_what_belongs_to_an_sae_is_fetched(hub, tmp_path, caplog, subfolder: str, prefix: int | None):
    make_sae().push_to_hub(REPO, subfolder=subfolder or None)
    before = {name.rpartition("/")[2] for name in hub.files(REPO)}
    at = f"{subfolder}/" if subfolder else ""
    hub.put(REPO, {f"{place}{name}": b"raise SystemExit" for name in STRANGERS for place in {at, ""}})
    pull(REPO, tmp_path / "sae", prefix=prefix)
    found = contents(tmp_path / "sae")
    assert {name.rpartition("/")[2] for name in found} <= before | {INDEX_NAME}
    assert f"{at}model.safetensors" in found
    assert prefix is not None or {name for name in found if name.startswith(at)} >= {f"{at}config.json"}
    if prefix is None:
        said = [record.getMessage() for record in caplog.records if "no part of an SAE" in record.getMessage()]
        assert len(said) == 1
        assert "'--help'" in said[0]
    assert MatryoshkaSAE.from_pretrained(tmp_path / "sae", subfolder=subfolder).config.hidden_size == 8


def test_what_was_left_out_is_named(hub, tmp_path, caplog):
    make_sae().push_to_hub(REPO)
    hub.put(REPO, {"torch.py": b"", "-rf": b""})
    pull(REPO, tmp_path / "sae")
    assert caplog.messages == [f"Not fetched from {REPO}, since it is no part of an SAE: '-rf', 'torch.py'"]


def test_only_our_own_code_is_published(hub, tmp_path):
    make_sae().save_pretrained(tmp_path)
    for name in STRANGERS:
        (tmp_path / name).write_text("raise SystemExit")
    push_folder(tmp_path, REPO)
    assert {name for name in hub.files(REPO) if name.endswith(".py")} == CODE_NAMES
    assert hub.files(REPO).keys().isdisjoint(STRANGERS)


OUTSIDE = ["../x", "a/../../x", "/etc", "C:/x", "..\\x", "a\0b", ".git/hooks", "-rf", "a/.ssh", "./a", "a//b", 3, None]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_leads_elsewhere_is_refused(hub, tmp_path, name):
    make_sae().push_to_hub(REPO, subfolder="a")
    index = json.loads(hub.files(REPO)[INDEX_NAME])
    index["saes"][0]["subfolder"] = name
    hub.put(REPO, {INDEX_NAME: json.dumps(index).encode()})
    for read in (list_saes, load_saes, lambda repo: pull(repo, tmp_path / "new" / "sae")):
        with pytest.raises(NoSAEError, match=r"is no index of SAEs"):
            read(REPO)
    assert not (tmp_path / "new").exists() or contents(tmp_path) == set()


WRONG = {
    "hidden_size": ["x", -1, None, 10**30],
    "num_latents": ["x", 0, 2.5, 10**400],
    "prefix_sizes": ["ab", [], [32, 8], list(range(1, 5000)), {"a": 1}],
    "k": ["x", -1, None],
    "activation": ["x", None, 3],
    "site": [3, {}],
    "base_model": [3, []],
    "l0": ["x", [1]],
    "fve": ["x", {}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_an_index_of_nonsense_is_refused(hub, name: str, value):
    make_sae().push_to_hub(REPO, subfolder="a")
    index = json.loads(hub.files(REPO)[INDEX_NAME])
    index["saes"][0][name] = value
    hub.put(REPO, {INDEX_NAME: json.dumps(index).encode()})
    if (name, value) == ("prefix_sizes", []):
        assert list_saes(REPO)
        return
    with pytest.raises(NoSAEError, match=r"is no index of SAEs"):
        list_saes(REPO)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"\xff\xfe", b"3", b'{"version": [], "saes": []}', b'{"version": 1, "saes": 3}']
)
def test_an_index_that_is_none_is_refused(hub, text: bytes):
    hub.put(REPO, {INDEX_NAME: text})
    with pytest.raises(NoSAEError, match=r"is no index of SAEs"):
        list_saes(REPO)


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "..\\a", "a\0", ".git", "-rf"])
def test_a_subfolder_that_leads_elsewhere_is_refused_in_both_directions(hub, tmp_path, name: str):
    make_sae().push_to_hub(REPO, subfolder="a")
    make_sae().save_pretrained(tmp_path / "sae")
    with pytest.raises(ValueError, match=r"must be a path below|has no SAE in"):
        pull(REPO, tmp_path / "new", subfolder=name)
    with pytest.raises(PublishError, match=r"must be a path below"):
        push_folder(tmp_path / "sae", REPO, subfolder=name)
    with pytest.raises(PublishError, match=r"must be a path below"):
        make_sae().push_to_hub(REPO, subfolder=name)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("unfinished", ["last-checkpoint", "checkpoint-100", ".trash"])
@pytest.mark.parametrize("place", ["disk", "hub", "index"])
def test_what_a_run_has_not_finished_is_no_sae(hub, tmp_path, unfinished: str, place: str):
    for name in ("a", unfinished, f"{unfinished}/sae", f"a/{unfinished}"):
        make_sae().save_pretrained(tmp_path / name)
    if place == "disk":
        source = tmp_path
    else:
        files = {name: (tmp_path / name).read_bytes() for name in contents(tmp_path)}
        hub.put(REPO, files)
        source = REPO
    if place == "index":
        make_sae().push_to_hub(REPO, subfolder="a")
        index = json.loads(hub.files(REPO)[INDEX_NAME])
        if unfinished != ".trash":
            index["saes"].append(index["saes"][0] | {"subfolder": unfinished})
            hub.put(REPO, {INDEX_NAME: json.dumps(index).encode()})
    assert [entry.subfolder for entry in list_saes(source)] == ["a"]
    assert list(load_saes(source)) == ["a"]


def test_an_sae_in_several_files_is_fetched_whole(hub, tmp_path):
    sae = make_sae()
    sae.save_pretrained(tmp_path / "sae", max_shard_size="1KB")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "sae").glob("model-*.safetensors")}
    assert len(sizes) > 1
    HfApi().create_repo(REPO)
    HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path / "sae")
    (pulled,) = pull(REPO, tmp_path / "new")
    assert pulled.num_bytes == pulled.num_bytes_on_hub == sum(sizes.values())
    assert torch.equal(MatryoshkaSAE.from_pretrained(tmp_path / "new").W_dec, sae.W_dec)
