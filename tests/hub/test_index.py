"""Repos and folders of several SAEs: what is there, and loading some of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from transformers import AutoModel

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cli.main import main
from hf_msae.formats.naming import natural_order
from hf_msae.hub import pull, push_folder
from hf_msae.hub.index import (
    NoSAEError,
    SAEEntry,
    choose,
    format_index,
    is_same_site,
    list_saes,
    load_saes,
    make_entry,
    parse_index,
)
from hf_msae.sites import resolve_site

pytestmark = pytest.mark.slow

REPO = "tester/many"
SITES = ["model.layers.2:output", "model.layers.10:output", "model.layers.10.mlp:output"]


def make_sae(site: str, seed: int = 0, **changes: Any) -> MatryoshkaSAE:
    torch.manual_seed(seed)
    shape = {"hidden_size": 8, "num_latents": 32, "prefix_sizes": [4, 16, 32], "k": 2.5}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**(shape | {"site": site, "base_model": "owner/lm"} | changes))).eval()
    sae.calibrate_threshold([torch.randn(300, 8)])
    return sae


@pytest.fixture
def saes() -> dict[str, MatryoshkaSAE]:
    return {f"at/{index}": make_sae(site, index) for index, site in enumerate(SITES)}


@pytest.fixture
def folder(saes: dict[str, MatryoshkaSAE], tmp_path: Path) -> Path:
    """SAEs in folders, and what is none."""
    for name, sae in saes.items():
        sae.save_pretrained(tmp_path / name)
        sae.save_pretrained(tmp_path / name / "checkpoint-10")
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text("not JSON")
    return tmp_path


@pytest.fixture
def without_index(hub, folder: Path) -> str:
    """A repo that somebody uploaded by other means."""
    HfApi().create_repo(REPO)
    HfApi().upload_folder(repo_id=REPO, folder_path=folder)
    return REPO


@pytest.fixture
def with_index(hub, saes: dict[str, MatryoshkaSAE]) -> str:
    for name, sae in saes.items():
        sae.push_to_hub(REPO, subfolder=name)
    return REPO


# Entries


def test_an_entry_says_what_the_sae_is():
    sae = make_sae(SITES[0])
    sae.config.measured = {"tokens": 10, "l0": [1.0, 2.0, 2.5], "fve": [0.1, 0.2, 0.3]}
    entry = make_entry("a", sae.config)
    assert entry == SAEEntry("a", SITES[0], "owner/lm", 8, 32, [4, 16, 32], 2.5, "batch_topk", 2.5, 0.3)
    assert make_entry("a", sae.config.truncated(16)).fve == 0.2
    # 20 was no level of the run: numbers of the 16 inside it are not its own.
    assert make_entry("a", sae.config.truncated(20)).fve is None


def test_the_index_is_read_back():
    entries = [make_entry(name, make_sae(SITES[0]).config) for name in ("l10", "l2")]
    text = format_index(entries)
    assert [entry["subfolder"] for entry in json.loads(text)["saes"]] == ["l2", "l10"]
    assert parse_index(text, "here") == entries[::-1]
    more = json.loads(text) | {"later": 1}
    more["saes"][0]["later"] = 1
    assert parse_index(json.dumps(more), "here") == entries[::-1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no index of SAEs"),
        ("[]", "is no index of SAEs"),
        ('{"version": 1}', "is no index of SAEs"),
        ('{"version": 1, "saes": [{"subfolder": "a"}]}', "is no index of SAEs"),
        ('{"version": 2, "saes": []}', "version 2, and this hf_msae knows up to 1: update"),
    ],
)
def test_another_index_is_refused(text, said):
    with pytest.raises(NoSAEError, match=said):
        parse_index(text, "here")


def test_numbers_are_sorted_as_numbers():
    assert sorted(["l10", "l2", "", "l2.b", "a"], key=natural_order) == ["", "a", "l2", "l2.b", "l10"]


# Listing


def test_a_folder_is_listed_without_an_index(folder):
    assert [(entry.subfolder, entry.site) for entry in list_saes(folder)] == [
        (f"at/{index}", site) for index, site in enumerate(SITES)
    ]


def test_a_repo_is_listed_without_an_index(folder, without_index):
    assert list_saes(without_index) == list_saes(folder)


def test_a_repo_with_an_index_is_listed_by_one_file(hub, folder, with_index):
    before = len(hub.requests)
    assert list_saes(with_index) == list_saes(folder)
    fetched = [request.path for request in hub.requests[before:] if request.method == "GET"]
    assert [path.split("/")[-1] for path in fetched] == ["sae_index.json"]


def test_one_sae_at_the_root_is_listed(hub, tmp_path):
    sae = make_sae(SITES[0])
    sae.push_to_hub("tester/one")
    (entry,) = list_saes("tester/one")
    assert (entry.subfolder, entry.num_latents) == ("", 32)
    assert list(load_saes("tester/one")) == [""]
    assert "sae_index.json" not in hub.files("tester/one")


@pytest.mark.parametrize("kind", ["with_index", "without_index"])
def test_what_was_listed_once_is_listed_offline(request, hub, kind):
    repo = request.getfixturevalue(kind)
    listed = list_saes(repo)
    hub.stop()
    assert list_saes(repo, local_files_only=True) == listed


def test_a_revision_is_listed(hub, with_index):
    api = HfApi()
    api.create_branch(REPO, branch="old")
    make_sae(SITES[0]).push_to_hub(REPO, subfolder="new")
    assert len(list_saes(REPO)) == 4
    assert len(list_saes(REPO, revision="old")) == 3


def test_a_folder_that_was_deleted_leaves_the_index_at_the_next_push(hub, with_index):
    HfApi().delete_folder("at/1", REPO)
    make_sae(SITES[0], 5).push_to_hub(REPO, subfolder="new")
    assert [entry.subfolder for entry in list_saes(REPO)] == ["at/0", "at/2", "new"]
    assert "at/1" not in hub.files(REPO)["README.md"].decode()


def test_a_push_into_a_repo_without_an_index_makes_one_of_all(hub, without_index):
    make_sae(SITES[0], 5).push_to_hub(REPO, subfolder="new")
    index = json.loads(hub.files(REPO)["sae_index.json"])
    assert [entry["subfolder"] for entry in index["saes"]] == ["at/0", "at/1", "at/2", "new"]


# Loading


def test_all_are_loaded(saes, with_index):
    loaded = load_saes(with_index)
    assert list(loaded) == ["at/0", "at/1", "at/2"]
    for name, sae in loaded.items():
        assert torch.equal(sae.W_dec, saes[name].W_dec)


def test_some_sites_and_some_latents_are_loaded(saes, with_index, folder):
    for source in (with_index, folder):
        loaded = load_saes(source, sites=["layers.2", "layers.10.mlp"], prefix=16)
        assert list(loaded) == ["at/0", "at/2"]
        for name, sae in loaded.items():
            assert torch.equal(sae.W_enc, saes[name].W_enc[:16])
            assert sae.config.prefix_sizes == [4, 16]


def test_more_arguments_reach_from_pretrained(folder):
    assert {sae.dtype for sae in load_saes(folder, dtype=torch.bfloat16).values()} == {torch.bfloat16}


def test_an_unknown_site_lists_those_that_there_are(folder):
    with pytest.raises(
        NoSAEError, match="reads the site 'layers.3'; there are " + ", ".join(sorted(SITES, key=natural_order))
    ):
        load_saes(folder, sites="layers.3")


@pytest.mark.parametrize(
    ("short", "path"),
    [
        ("layers.12", "transformer.h.12:output"),
        ("layers.12:output", "gpt_neox.layers.12"),
        ("layers.12:input", "model.layers.12:input"),
        ("layers.0.attn", "model.layers.0.self_attn:output"),
        ("layers.0.attn", "bert.encoder.layer.0.attention.output.dense:output"),
        ("layers.3.mlp", "transformer.h.3.mlp:output"),
        ("layers.3.mlp", "model.decoder.layers.3.fc2:output"),
        ("layers.3.mlp.down_proj", "model.layers.3.mlp.down_proj:output"),
        ("embeddings", "transformer.wte:output"),
        ("embeddings", "model.embed_tokens:output"),
    ],
)
def test_short_forms_name_sites_of_any_architecture(short, path):
    assert is_same_site(short, path)


@pytest.mark.parametrize(
    ("short", "path"),
    [
        ("layers.1", "model.layers.12:output"),
        ("layers.12", "model.layers.12:input"),
        ("layers.12", "model.layers.12.mlp:output"),
        ("layers.12.attn", "model.layers.12.mlp:output"),
        ("embeddings", "model.layers.0:output"),
        ("embeddings", "model.norm:output"),
    ],
)
def test_other_sites_are_others(short, path):
    assert not is_same_site(short, path)


@pytest.mark.parametrize("form", ["layers.1", "layers.0.attn", "layers.0.mlp", "layers.1.mlp.up_proj", "embeddings"])
def test_a_short_form_names_what_the_model_resolves_it_to(lm, form):
    assert is_same_site(form, str(resolve_site(lm, form)))


def test_an_exact_path_is_preferred_to_what_its_name_may_mean():
    entries = [make_entry(name, make_sae(f"{name}.layers.3:output").config) for name in ("encoder", "decoder")]
    assert [entry.subfolder for entry in choose(entries, "encoder.layers.3:output")] == ["encoder"]
    assert len(choose(entries, ["layers.3"])) == 2


# What is not there


def test_a_repo_that_holds_another_model_says_so(hub):
    hub.put("tester/lm", {"config.json": b'{"model_type": "llama"}'})
    with pytest.raises(NoSAEError, match=r"tester/lm holds no Matryoshka SAE\. It holds a model of the type 'llama'"):
        list_saes("tester/lm")


def test_a_repo_that_holds_other_files_names_them(hub, tmp_path):
    hub.put("tester/files", {"cfg.json": b"{}", "sae_weights.safetensors": b""})
    with pytest.raises(NoSAEError, match=r"It holds a checkpoint of SAELens: .*hf-msae convert"):
        list_saes("tester/files")
    with pytest.raises(NoSAEError, match="It holds nothing"):
        list_saes(tmp_path)


def test_what_cannot_be_found_is_told_in_words(hub):
    with pytest.raises(NoSAEError, match=r"no folder and no Hub repo tester/absent that you may read.*log in"):
        list_saes("tester/absent")
    with pytest.raises(NoSAEError, match="neither a folder nor the id of a Hub repo"):
        list_saes("./absent/folder")
    make_sae(SITES[0]).push_to_hub(REPO, private=True)
    with pytest.raises(NoSAEError, match="that you may read"):
        list_saes(REPO, token=hub.stranger_token)
    with pytest.raises(NoSAEError, match="tester/many has no revision 'v2'"):
        list_saes(REPO, revision="v2")
    with pytest.raises(NoSAEError, match="not in the local cache"):
        list_saes("tester/never-seen", local_files_only=True)


def test_a_hub_out_of_reach_is_told_in_words(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # 23 seconds between the attempts of the Hub's client
    hub.stop()
    with pytest.raises(NoSAEError, match="not in the local cache, and the Hub cannot be asked"):
        list_saes("tester/never-seen")


def test_transformers_loads_from_a_folder_of_the_repo(saes, with_index):
    loaded = AutoModel.from_pretrained(REPO, subfolder="at/1")
    assert torch.equal(loaded.W_dec, saes["at/1"].W_dec)


# Other libraries' checkpoints, which are listed by nothing here


def write_saelens(folder: Path) -> None:
    make_sae(SITES[0]).to_saelens(folder)


def write_sparsify(folder: Path) -> None:
    make_sae(SITES[0], activation="topk", inference="topk", k=2).to_sparsify(folder)


def write_dictionary_learning(folder: Path, weights: str = "ae.pt") -> None:
    (folder / weights).parent.mkdir(parents=True)
    linear = {"encoder.weight": (32, 8), "encoder.bias": (32,), "decoder.weight": (8, 32), "b_dec": (8,)}
    torch.save({name: torch.randn(shape) for name, shape in linear.items()}, folder / weights)
    trainer = {"dict_class": "AutoEncoderTopK", "k": 2, "dict_size": 32, "activation_dim": 8}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))


def write_in_training(folder: Path) -> None:
    write_dictionary_learning(folder, "checkpoints/ae_30.pt")


def write_gemma_scope(folder: Path) -> None:
    folder.mkdir(parents=True)
    shapes = {"w_enc": (8, 32), "w_dec": (32, 8), "b_enc": (32,), "b_dec": (8,), "threshold": (32,)}
    save_file({name: torch.rand(shape) for name, shape in shapes.items()}, folder / "params.safetensors")


LIBRARIES = {
    "SAELens": write_saelens,
    "sparsify": write_sparsify,
    "dictionary_learning": write_dictionary_learning,
    "dictionary_learning in training": write_in_training,
    "Gemma Scope": write_gemma_scope,
}


@pytest.mark.parametrize("place", ["disk", "hub"])
@pytest.mark.parametrize("names", [["."], ["layers.2"], ["layers.10", "layers.2"]], ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_said_of_another_librarys_checkpoints_is_true(hub, tmp_path, library, names, place):
    """The call that the message names reads one of them, and so does the command."""
    folder = tmp_path / "all"
    for name in names:
        LIBRARIES[library](folder / name)
    source = str(folder)
    if place == "hub":
        HfApi().create_repo(REPO)
        HfApi().upload_folder(repo_id=REPO, folder_path=folder)
        source = REPO
    messages = set()
    for act in (
        list_saes,
        load_saes,
        lambda source: pull(source, tmp_path / "pulled"),
        lambda _: push_folder(folder, "a/b", token="t"),
    ):
        with pytest.raises(NoSAEError) as raised:
            act(source)
        messages.add(str(raised.value).replace(str(folder), source))
    (message,) = messages
    count = "a checkpoint" if len(names) == 1 else "2 checkpoints"
    assert f"{source} holds no Matryoshka SAE. It holds {count} of {library.split()[0]}" in message
    call = re.search(r"MatryoshkaSAE\.from_pretrained\(.*?\)", message)
    assert eval(call[0], {"MatryoshkaSAE": MatryoshkaSAE}).config.num_latents == 32
    command = re.search(r"`hf-msae (.*?)`", message)[1].replace("DEST", str(tmp_path / "converted"))
    with pytest.raises(SystemExit) as exited:
        main(command.split())
    assert exited.value.code == 0
    assert [entry.num_latents for entry in list_saes(tmp_path / "converted")] == [32]


def test_a_configuration_without_weights_is_no_checkpoint(tmp_path):
    (tmp_path / "cfg.json").write_text('{"d_sae": 32}')
    with pytest.raises(NoSAEError, match="the configuration of a SAELens checkpoint, but not its weights"):
        list_saes(tmp_path)


def test_a_folder_of_both_names_both(tmp_path):
    make_sae(SITES[0]).save_pretrained(tmp_path / "ours")
    write_saelens(tmp_path / "theirs")
    assert [entry.subfolder for entry in list_saes(tmp_path)] == ["ours"]
    with pytest.raises(ValueError, match=r"1 SAELens checkpoint.*subfolder=: theirs\. Beside them .*: ours\."):
        MatryoshkaSAE.from_pretrained(tmp_path)
