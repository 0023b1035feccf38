"""Files of an activation cache that are damaged or absurd: one sentence for each, before anything large is read."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_msae.data import (
    ActivationStream,
    CachedActivations,
    CacheError,
    TokenWindows,
    cache_activations,
    forward,
    is_activation_cache,
)

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NO_JSON = [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"null"]


@pytest.fixture(scope="module")
def make_stream(lm, tokenizer, texts):
    def make():
        windows = TokenWindows(texts[:40], tokenizer, context_length=16)
        return ActivationStream(lm, ["layers.0"], windows, batch_size=16, block_tokens=100, lm_batch_size=4)

    return make


@pytest.fixture(scope="module")
def cached(make_stream, tmp_path_factory):
    return cache_activations(
        make_stream(), tmp_path_factory.mktemp("cache") / "whole", max_tokens=200, shard_tokens=64
    )


@pytest.fixture(scope="module")
def unfinished(make_stream, tmp_path_factory):
    """What an interrupted run leaves: the folder that is to be finished, and the progress in it."""
    directory, capture, runs = tmp_path_factory.mktemp("cache") / "whole", forward.capture, []

    def interrupted(*args, **kwargs):
        runs.append(1)
        if len(runs) > 6:
            raise KeyboardInterrupt
        return capture(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "capture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache_activations(make_stream(), directory, max_tokens=400, shard_tokens=64)
    return directory


def edited(contents, path, value):
    """The JSON with another value at a path of keys."""
    copy = json.loads(json.dumps(contents))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


def places(contents, path=()):
    """All paths of keys into a JSON object."""
    items = (
        contents.items() if isinstance(contents, dict) else enumerate(contents) if isinstance(contents, list) else ()
    )
    for key, value in items:
        yield (*path, key)
        if isinstance(value, list | dict):
            yield from places(value, (*path, key))


@pytest.mark.parametrize("contents", NO_JSON)
def test_an_index_that_is_no_json_is_told(cached, tmp_path, contents):
    folder = shutil.copytree(cached, tmp_path / "cache")
    (folder / "index.json").write_bytes(contents)
    assert is_activation_cache(folder)  # and no folder of texts
    with pytest.raises(CacheError, match="write the cache anew"):
        CachedActivations(folder, batch_size=8)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_index_with_anything_in_it_is_read_or_refused(cached, data):
    """Whatever stands in it, in whatever place: a reader that works, or `CacheError`."""
    index = json.loads((cached / "index.json").read_text())
    place = data.draw(st.sampled_from(list(places(index))))
    folder = cached.with_name("edited")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(cached, folder)
    (folder / "index.json").write_text(json.dumps(edited(index, place, data.draw(ANYTHING))))
    try:
        reader = CachedActivations(folder, batch_size=8)
    except CacheError:
        return
    assert next(reader)[reader.sites[0]].shape == (8, 16)
    assert reader.norm_limit(reader.sites[0]) is not None


@pytest.mark.parametrize(
    "name", ["../activations-00000.safetensors", "/etc/passwd", "x/activations-00000.safetensors"]
)
def test_a_shard_lies_in_the_cache(cached, tmp_path, name):
    folder = shutil.copytree(cached, tmp_path / "inner" / "cache")
    shutil.copy(folder / "activations-00000.safetensors", folder.parent)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(edited(index, ("shards", 0, "file"), name)))
    with pytest.raises(CacheError, match="is damaged: its 'shards' is"):
        CachedActivations(folder, batch_size=8)


@pytest.mark.parametrize("contents", NO_JSON)
def test_progress_that_is_no_json_is_told(unfinished, make_stream, tmp_path, contents):
    shutil.copytree(unfinished.with_name("whole.incomplete"), tmp_path / "whole.incomplete")
    (tmp_path / "whole.incomplete" / "progress.json").write_bytes(contents)
    with pytest.raises(CacheError, match="Remove the folder"):
        cache_activations(make_stream(), tmp_path / "whole", max_tokens=400, shard_tokens=64)


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_progress_with_anything_in_it_is_continued_or_refused(unfinished, make_stream, data):
    folder = unfinished.with_name("edited.incomplete")
    for old in (folder, folder.with_name("edited")):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(unfinished.with_name("whole.incomplete"), folder)
    progress = json.loads((folder / "progress.json").read_text())
    place = data.draw(st.sampled_from(list(places(progress))))
    (folder / "progress.json").write_text(json.dumps(edited(progress, place, data.draw(ANYTHING))))
    try:
        found = cache_activations(make_stream(), folder.with_name("edited"), max_tokens=400, shard_tokens=64)
    except CacheError:
        return
    assert is_activation_cache(found)
