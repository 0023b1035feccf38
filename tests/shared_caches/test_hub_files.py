"""Caches on the Hub: shards come while they are read, and what is wrong is told in a sentence before any comes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from patience import until
from safetensors.torch import load_file

from hf_msae import load_activation_cache, push_activation_cache
from hf_msae.data import ActivationStream, CachedActivations, CacheError, TokenWindows, as_documents, cache_activations
from hf_msae.shared_caches import is_cache_source
from hf_msae.shared_caches.hub_files import AHEAD

SHARDS = 8


@pytest.fixture(scope="module")
def cached(tmp_path_factory, lm, tokenizer, texts) -> Path:
    """512 tokens in eight shards."""
    windows = TokenWindows(as_documents(texts), tokenizer, context_length=16)
    stream = ActivationStream(lm, ["layers.0"], windows, batch_size=64, block_tokens=200)
    return cache_activations(stream, tmp_path_factory.mktemp("cache") / "activations", max_tokens=512, shard_tokens=64)


@pytest.fixture
def repo(hub, cached) -> str:
    name = f"{hub.user}/activations"
    push_activation_cache(cached, name)
    hub.requests.clear()
    return name


def rows(cache: CachedActivations) -> torch.Tensor:
    return torch.cat([batch[cache.sites[0]] for batch in cache])


def shards_sent(hub) -> int:
    return len({request.path for request in hub.asked(r"GET /large/") if request.sent})


def test_the_same_rows_in_the_same_order_as_from_the_folder(repo, cached):
    for seed in (0, 1):
        options = {"batch_size": 24, "seed": seed, "epochs": 2}
        streamed = CachedActivations(load_activation_cache(repo).files, **options)
        local = CachedActivations(cached, **options)
        assert torch.equal(rows(streamed), rows(local))
        assert streamed.state_dict() == local.state_dict()
    assert load_activation_cache(repo).fingerprint() == CachedActivations(cached, batch_size=1).fingerprint()


def test_opening_fetches_no_shard_and_reading_a_few_ahead(repo, hub):
    opened = CachedActivations(load_activation_cache(repo).files, batch_size=64)
    assert shards_sent(hub) == 0
    next(opened)
    until(lambda: shards_sent(hub) == 1 + AHEAD)
    next(opened)
    until(lambda: shards_sent(hub) == 2 + AHEAD)
    list(opened)
    assert shards_sent(hub) == SHARDS
    before = len(hub.requests)
    assert len(rows(CachedActivations(opened.files, batch_size=64, seed=1))) == 512  # from the Hub's cache here
    assert len(hub.requests) == before


def test_what_was_fetched_whole_needs_no_network(repo, hub, cached):
    list(CachedActivations(load_activation_cache(repo).files, batch_size=64))
    hub.stop()
    again = load_activation_cache(repo)
    assert torch.equal(rows(again), rows(CachedActivations(cached, batch_size=1)))
    assert again.files.description.startswith(repo)


def test_a_part_of_it_is_not_enough_without_a_network(repo, hub):
    next(load_activation_cache(repo))
    hub.stop()
    with pytest.raises(CacheError, match=f"The data set {repo} cannot be read from http"):
        load_activation_cache(repo)


def test_a_shard_that_fails_once_is_asked_for_again(repo, hub, cached, monkeypatch):
    """Whether it was wanted or on its way in the background: the second fails thrice."""
    monkeypatch.setattr("hf_msae.hub.retrying.MAX_WAIT_S", 0)
    hub.fail(r"HEAD /datasets/.*safetensors", status=503, skip=1, times=3)
    opened = CachedActivations(load_activation_cache(repo).files, batch_size=64)
    assert torch.equal(rows(opened), rows(CachedActivations(cached, batch_size=64)))


def test_a_shard_that_cannot_be_had_is_named(repo, hub, monkeypatch):
    monkeypatch.setattr("hf_msae.hub.retrying.MAX_WAIT_S", 0)
    opened = CachedActivations(load_activation_cache(repo).files, batch_size=64)
    hub.fail(r"HEAD /datasets/.*safetensors", status=404, times=100)
    with pytest.raises(CacheError, match=rf"^activations-0000\d.safetensors of {repo} at \w{{40}}, an activation cac"):
        list(opened)


def test_what_is_missing_or_another_is_told_before_any_shard_comes(hub, cached, tmp_path):
    files = {path.name: path.read_bytes() for path in cached.iterdir()}
    without = {name: content for name, content in files.items() if name != "activations-00003.safetensors"}
    mixed = files | {"activations-00003.safetensors": files["activations-00004.safetensors"]}
    index = json.loads(files["index.json"])
    cases = {
        "partial": (without, r"lacks 1 of its 8 shards, the first of them activations-00003\.safetensors; push"),
        "mixed": (mixed, r"has another activations-00003\.safetensors than its index says; push the cache again"),
        "cut": (files | {"index.json": files["index.json"][:50]}, "write the cache anew"),
        "newer": (files | {"index.json": json.dumps(index | {"version": 9}).encode()}, "has version 9, this hf_msae"),
        "astray": (
            files | {"index.json": json.dumps(index | {"shards": [{"file": "../x", "num_tokens": 1}]}).encode()},
            "is damaged: its 'shards' is",
        ),
        "text": ({"a.txt": b"some text"}, r"holds no activation cache, or not all of one: it has no index\.json"),
    }
    for name, (content, said) in cases.items():
        hub.put(f"{hub.user}/{name}", content, kind="dataset")
        assert is_cache_source(f"{hub.user}/{name}") == (name != "text")
        with pytest.raises(CacheError, match=said):
            load_activation_cache(f"{hub.user}/{name}")
    assert shards_sent(hub) == 0


def test_an_older_index_does_not_say_what_shards_hold_and_a_damaged_one_is_found_when_it_comes(hub, cached):
    files = {path.name: path.read_bytes() for path in cached.iterdir()}
    index = json.loads(files["index.json"])
    for shard in index["shards"]:
        del shard["sha256"]
    files["index.json"] = json.dumps(index).encode()
    hub.put(f"{hub.user}/old", files, kind="dataset")
    opened = load_activation_cache(f"{hub.user}/old")
    assert torch.equal(rows(opened), rows(CachedActivations(cached, batch_size=1)))
    other = files | {"activations-00003.safetensors": files["activations-00003.safetensors"][:-8]}
    hub.put(f"{hub.user}/old", other, kind="dataset")
    damaged = load_activation_cache(f"{hub.user}/old")
    assert damaged.fingerprint() != opened.fingerprint()
    with pytest.raises(CacheError, match=r"activations-00003\.safetensors is missing or damaged"):
        list(damaged)


def test_who_may_not_read_it_is_told_what_to_do(repo, hub, cached, tmp_path):
    with pytest.raises(CacheError, match="has no revision 'v9'"):
        load_activation_cache(repo, revision="v9")
    with pytest.raises(CacheError, match=r"There is no data set tester/nowhere on the Hub that this token sees"):
        load_activation_cache("tester/nowhere")
    with pytest.raises(CacheError, match=r"neither a folder nor the id of a data set on the Hub \(owner/name\)"):
        load_activation_cache("no/such/folder")
    hub.repo(repo, "dataset").gated = True
    with pytest.raises(CacheError, match=f"{repo} is gated: ask for access at http.*/datasets/{repo}, and log in"):
        load_activation_cache(repo, token=hub.stranger_token)
    assert load_activation_cache(repo).num_available == 512
    hub.repo(repo, "dataset").private = True
    with pytest.raises(CacheError, match=r"log in .* where it is private"):
        load_activation_cache(repo, token=hub.stranger_token)
    copy = shutil.copytree(cached, tmp_path / "here")
    with pytest.raises(CacheError, match=r"is for a cache on the Hub, but .* is here"):
        load_activation_cache(copy, revision="main")


def test_what_is_pushed_is_the_folder_with_a_card_and_no_paths_of_this_machine(hub, cached, tmp_path):
    copy = shutil.copytree(cached, tmp_path / "here")
    index = json.loads((copy / "index.json").read_text())
    private = {
        "base_model": "/home/me/models/gemma",
        "tokenizer": "/home/me/models/gemma",
        "dataset": "/home/me/a.txt train",
    }
    (copy / "index.json").write_text(json.dumps(index | private | {"quantization": "8bit"}))
    name = f"{hub.user}/activations"
    push_activation_cache(copy, name, private=True)
    assert hub.repo(name, "dataset").private
    there = hub.files(name, kind="dataset")
    assert {*there} - {".gitattributes"} == {"README.md", *(path.name for path in cached.iterdir())}
    assert b"/home/me" not in b"".join(content for file, content in there.items() if not file.endswith(".safetensors"))
    for path in cached.glob("*.safetensors"):
        assert there[path.name] == path.read_bytes()
    card = there["README.md"].decode()
    for part in ("layers.0", "512, ", "a.txt", "in 8bit (bitsandbytes)", f"--dataset {name}", "n<1K"):
        assert part in card
    smaller = json.loads((copy / "index.json").read_text())
    smaller["shards"], smaller["num_tokens"] = smaller["shards"][:2], 128
    (copy / "index.json").write_text(json.dumps(smaller))
    push_activation_cache(copy, name)
    shards = [file for file in hub.files(name, kind="dataset") if file.startswith("activations-")]
    assert shards == ["activations-00000.safetensors", "activations-00001.safetensors"]
    assert len(load_file(copy / "activations-00000.safetensors")["model.layers.0:output"]) == 64
