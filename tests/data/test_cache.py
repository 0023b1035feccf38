"""The cache: what the stream gave, whole or not at all, shuffled anew in each epoch, shared out evenly, resumable."""

import json
import shutil
from collections import Counter, namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_msae.data import (
    ActivationStream,
    CachedActivations,
    CacheError,
    DatasetError,
    TokenWindows,
    cache,
    cache_activations,
    forward,
    is_activation_cache,
    load_documents,
)
from hf_msae.sites import Site

LAYER, MLP = Site("model.layers.0"), Site("model.layers.1.mlp")


@pytest.fixture(scope="session")
def make_stream(lm, tokenizer, texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(texts[:60]))

    def make(**changes) -> ActivationStream:
        found = TokenWindows(load_documents(path), tokenizer, context_length=16)
        options = {"batch_size": 16, "block_tokens": 200, "lm_batch_size": 4} | changes
        return ActivationStream(lm, ["layers.0", "layers.1.mlp"], found, **options)

    return make


@pytest.fixture(scope="session")
def cached(make_stream, tmp_path_factory) -> Path:
    """832 tokens in 5 shards, the last of them shorter."""
    directory = tmp_path_factory.mktemp("cache") / "activations"
    return cache_activations(make_stream(), directory, max_tokens=840, shard_tokens=200)


def rows(batches, site: Site = LAYER) -> Tensor:
    return torch.cat([batch[site] for batch in batches])


def as_multiset(found: Tensor) -> Counter[tuple[float, ...]]:
    return Counter(tuple(row) for row in found.tolist())


def test_the_cache_holds_what_the_stream_gave(cached, make_stream):
    expected = make_stream()
    batches = [next(expected) for _ in range(52)]
    index = json.loads((cached / "index.json").read_text())
    assert index["num_tokens"] == 832
    assert [shard["num_tokens"] for shard in index["shards"]] == [192, 192, 192, 192, 64]
    for site in (LAYER, MLP):
        stored = torch.cat([load_file(cached / shard["file"])[str(site)] for shard in index["shards"]])
        assert torch.equal(stored, rows(batches, site))
    assert index["hidden_sizes"] == {str(LAYER): 16, str(MLP): 16}
    assert index["dtypes"] == {str(LAYER): "float32", str(MLP): "float32"}
    assert index["context_length"] == 16
    assert index["dataset"].endswith("words.txt train")
    assert {path.name for path in cached.iterdir()} == {"index.json", *(shard["file"] for shard in index["shards"])}
    assert not list(cached.parent.glob("*.incomplete"))
    assert is_activation_cache(cached)


def test_reading_gives_every_row_once_in_another_order_each_epoch(cached):
    reader = CachedActivations(cached, batch_size=52, epochs=2)
    batches = list(reader)
    first, second = rows(batches[:16]), rows(batches[16:])
    stored = torch.cat([load_file(path)[str(LAYER)] for path in sorted(cached.glob("*.safetensors"))])
    assert reader.num_available == reader.num_tokens == 2 * 832
    assert as_multiset(first) == as_multiset(second) == as_multiset(stored)
    assert len(stored) == 832
    assert not torch.equal(first, second)
    assert not torch.equal(first, stored)
    assert not torch.equal(first, rows(CachedActivations(cached, batch_size=52, seed=1)))


def test_rows_of_a_shard_are_shuffled_anew_in_each_epoch(make_stream, tmp_path):
    one_shard = cache_activations(make_stream(), tmp_path / "one", max_tokens=64)
    first, second = CachedActivations(one_shard, batch_size=64, epochs=2)
    assert not torch.equal(first[LAYER], second[LAYER])
    assert as_multiset(first[LAYER]) == as_multiset(second[LAYER])


def test_shards_are_read_in_an_order_that_the_seed_fixes(cached):
    def first_shard(seed: int) -> int:
        row = tuple(next(CachedActivations(cached, batch_size=1, seed=seed))[MLP][0].tolist())
        paths = sorted(cached.glob("*.safetensors"))
        return next(i for i, path in enumerate(paths) if row in as_multiset(load_file(path)[str(MLP)]))

    firsts = [first_shard(seed) for seed in range(8)]
    assert len(set(firsts)) > 2
    assert firsts == [first_shard(seed) for seed in range(8)]


def test_sites_stay_together(cached):
    together = {tuple(a): b for a, b in zip(*(rows_of(cached, site) for site in (LAYER, MLP)), strict=True)}
    batch = next(CachedActivations(cached, batch_size=100))
    assert all(together[tuple(a)] == b for a, b in zip(batch[LAYER].tolist(), batch[MLP].tolist(), strict=True))
    only = next(CachedActivations(cached, batch_size=100, sites=["model.layers.1.mlp"]))
    assert list(only) == [MLP]
    assert torch.equal(only[MLP], batch[MLP])


def rows_of(cached: Path, site: Site) -> list[list[float]]:
    return [row for path in sorted(cached.glob("*.safetensors")) for row in load_file(path)[str(site)].tolist()]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_rows_evenly(cached, world_size):
    readers = [CachedActivations(cached, batch_size=1, rank=r, world_size=world_size) for r in range(world_size)]
    parts = [rows(reader) for reader in readers]
    share = sum(n // world_size for n in [192, 192, 192, 192, 64])
    assert [len(part) for part in parts] == [share] * world_size
    assert [reader.num_available for reader in readers] == [share] * world_size
    shards = [load_file(path)[str(LAYER)] for path in sorted(cached.glob("*.safetensors"))]
    shared_out = torch.cat([shard[: len(shard) // world_size * world_size] for shard in shards])
    assert as_multiset(torch.cat(parts)) == as_multiset(shared_out)


class GatheredRows(TorchDispatchMode):
    """How many rows were taken out of activations, of both sites together."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.index and found.ndim == 2:
            self.count += len(found)
        return found


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 7, 48, 64]), st.integers(0, 6))
def test_processes_that_share_a_batch_read_their_own_rows_alone(cached, num_processes, size, stop):
    """Together they have the batches of one process, also where a batch is cut across shards, or a run goes on."""
    whole = CachedActivations(cached, batch_size=num_processes * size)
    seen = [batch for _, batch in zip(range(stop), whole, strict=False)]
    parts = []
    for rank in range(num_processes):
        own = CachedActivations(cached, batch_size=num_processes * size)
        own.part = range(rank * size, (rank + 1) * size)
        own.load_state_dict(whole.state_dict())
        with GatheredRows() as gathered:
            parts.append(list(own))
        # Those at the end, which fill no batch, are seen too late to be left alone.
        assert gathered.count <= 2 * (len(parts[-1]) + 1) * size
        assert own.num_tokens + own.num_dropped == own.num_available
    expected = list(whole)
    assert len(seen) + len(expected) == whole.num_available // whole.batch_size
    assert [len(part) for part in parts] == [len(expected)] * num_processes
    for batch, *pieces in zip(expected, *parts, strict=True):
        for site in (LAYER, MLP):
            assert torch.equal(torch.cat([piece[site] for piece in pieces]), batch[site])


@settings(max_examples=25, deadline=None)
@given(stop=st.integers(0, 40), batch_size=st.sampled_from([16, 30, 64, 192]), rank=st.integers(0, 1))
def test_resumed_equals_uninterrupted(cached, stop, batch_size, rank):
    def fresh() -> CachedActivations:
        return CachedActivations(cached, batch_size=batch_size, epochs=2, rank=rank, world_size=2)

    whole = fresh()
    expected = list(whole)
    stopped = fresh()
    seen = [batch for _, batch in zip(range(stop), stopped, strict=False)]
    resumed = fresh()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    found = seen + list(resumed)
    assert torch.equal(rows(found), rows(expected))
    assert torch.equal(rows(found, MLP), rows(expected, MLP))
    assert (resumed.num_tokens, resumed.num_dropped) == (whole.num_tokens, whole.num_dropped)
    assert whole.num_tokens + whole.num_dropped == whole.num_available


def interrupt_after(monkeypatch, passes: int) -> None:
    original, calls = forward.capture, []

    def capture(*args, **kwargs):
        calls.append(1)
        if len(calls) > passes:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(forward, "capture", capture)


@pytest.mark.parametrize("passes", [2, 9, 14])
def test_an_interrupted_cache_is_no_cache_and_is_continued(cached, make_stream, tmp_path, passes):
    directory = tmp_path / "activations"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, passes)
        with pytest.raises(KeyboardInterrupt):
            cache_activations(make_stream(), directory, max_tokens=840, shard_tokens=200)
    assert not is_activation_cache(directory)
    written = len(list((tmp_path / "activations.incomplete").glob("*.safetensors")))
    if written:
        with pytest.raises(CacheError, match=r"is incomplete .*call cache_activations again"):
            CachedActivations(directory, batch_size=8)
        with pytest.raises(CacheError, match=r"unfinished cache with another seed \(0, now 5\)"):
            cache_activations(make_stream(seed=5), directory, max_tokens=840, shard_tokens=200)
        other = make_stream()
        path = tmp_path / other.windows.documents.source.paths[0].name
        path.write_text("w1 " + other.windows.documents.source.paths[0].read_text())
        other.windows.documents.source.paths = [path]  # by the same name
        with pytest.raises(CacheError, match=r"unfinished cache with another data"):
            cache_activations(other, directory, max_tokens=840, shard_tokens=200)
    assert written == {2: 0, 9: 2, 14: 3}[passes]
    cache_activations(make_stream(), directory, max_tokens=840, shard_tokens=200)
    assert json.loads((directory / "index.json").read_text()) == json.loads((cached / "index.json").read_text())
    for path in cached.glob("*.safetensors"):
        assert path.read_bytes() == (directory / path.name).read_bytes()


class Bar:
    """What is shown, as tqdm's bar has it."""

    def __init__(self, total: int, **_) -> None:
        self.total, self.n, self.shown = total, 0, [0]

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_) -> None:
        pass

    def update(self, number: int) -> None:
        assert number >= 0
        self.n += number
        self.shown.append(self.n)


@pytest.mark.parametrize("shard_tokens", [64, 1 << 20])
def test_what_the_model_reads_is_shown_before_it_is_written(make_stream, tmp_path, monkeypatch, shard_tokens):
    """A block may take the model minutes, in which nothing is written."""
    bars: list[Bar] = []
    monkeypatch.setattr(cache.logging, "tqdm", lambda **options: bars.append(Bar(**options)) or bars[-1])
    written: list[int] = []
    save = cache.save_file
    monkeypatch.setattr(cache, "save_file", lambda *given: written.append(bars[0].n) or save(*given))
    cache_activations(make_stream(), tmp_path / "cache", max_tokens=320, shard_tokens=shard_tokens)
    (bar,) = bars
    assert bar.n == bar.total == 320
    assert len({n for n in bar.shown if n <= written[0]}) >= 3
    assert bar.shown == sorted(bar.shown)


def test_the_end_of_the_data_ends_the_cache(make_stream, texts, tmp_path):
    made = make_stream()
    directory = cache_activations(made, tmp_path / "all", max_tokens=10**6)
    total = sum(len(text.split()) for text in texts[:60])
    assert CachedActivations(directory, batch_size=16).num_available == total // 16 * 16


def test_damage_is_found_before_reading(cached, tmp_path):
    def damaged(name: str, damage) -> Path:
        directory = Path(shutil.copytree(cached, tmp_path / name))
        damage(directory / "activations-00002.safetensors")
        return directory

    cut = damaged("cut", lambda path: path.write_bytes(path.read_bytes()[:-100]))
    gone = damaged("gone", lambda path: path.unlink())
    other = damaged("other", lambda path: shutil.copy(path.with_name("activations-00004.safetensors"), path))
    for directory in (cut, gone):
        with pytest.raises(CacheError, match=r"activations-00002\.safetensors is missing or damaged"):
            CachedActivations(directory, batch_size=8)
    with pytest.raises(CacheError, match=r"holds .*\[64, 16\].* its index says .*\[192, 16\]"):
        CachedActivations(other, batch_size=8)


def test_errors_name_what_was_given_and_what_there_is(cached, make_stream, tmp_path, monkeypatch):
    with pytest.raises(CacheError, match=r"no activation cache at .*nowhere"):
        CachedActivations(tmp_path / "nowhere", batch_size=8)
    with pytest.raises(CacheError, match=r"no site model\.layers\.7:output; it has: model\.layers\.0:output"):
        CachedActivations(cached, batch_size=8, sites=["model.layers.7"])
    with pytest.raises(ValueError, match="rank 2 of 2"):
        CachedActivations(cached, batch_size=8, rank=2, world_size=2)
    with pytest.raises(DatasetError, match="the data ends after 832 activations, fewer than one batch of 900"):
        list(CachedActivations(cached, batch_size=900))
    state = CachedActivations(cached, batch_size=8, seed=1).state_dict()
    with pytest.raises(ValueError, match="'seed': 1"):
        CachedActivations(cached, batch_size=8).load_state_dict(state)
    with pytest.raises(CacheError, match="already exists"):
        cache_activations(make_stream(), cached, max_tokens=100)
    with pytest.raises(ValueError, match=r"max_tokens \(15\) is less than one batch of the stream \(16\)"):
        cache_activations(make_stream(), tmp_path / "new", max_tokens=15)
    used = make_stream()
    next(used)
    with pytest.raises(ValueError, match="already given batches"):
        cache_activations(used, tmp_path / "new", max_tokens=100)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(CacheError, match=r"need 1\.3 GB, but the disk of .* has 0\.0 GB free"):
        cache_activations(make_stream(), tmp_path / "new", max_tokens=10**7)


def test_other_folders_are_no_caches(tmp_path):
    assert not is_activation_cache(tmp_path)
    (tmp_path / "index.json").write_text("{not json")
    assert not is_activation_cache(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "other"}')
    assert not is_activation_cache(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "hf_msae.activations", "version": 99}')
    with pytest.raises(CacheError, match="has version 99, this hf_msae reads 1"):
        CachedActivations(tmp_path, batch_size=1)


def test_first_rows_are_kept_apart(cached):
    """What `first_rows` gives is what a reader with `skip_rows` never sees, and together they are the cache."""
    whole = CachedActivations(cached, batch_size=1)
    num_held = whole.index["shards"][0]["num_tokens"] + 3  # beyond the first shard
    held = whole.first_rows(num_held)[LAYER]
    rest = CachedActivations(cached, batch_size=1, skip_rows=num_held)
    assert held.shape[0] == num_held
    assert rest.num_available == whole.num_available - num_held
    assert as_multiset(torch.cat([held, rows(rest)])) == as_multiset(rows(whole))


def test_more_first_rows_than_there_are(cached):
    with pytest.raises(CacheError, match="fewer than the 1,000,000,000"):
        CachedActivations(cached, batch_size=1).first_rows(10**9)
