"""Shuffled documents: each once, in an order of the seed, resumed bit for bit, whatever they are stored in."""

import json

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_msae.data import DatasetError, as_documents, load_documents
from hf_msae.data.documents import Documents
from hf_msae.data.sources import StreamSource

TEXTS = [f"document {i}" + " word" * (i % 4) for i in range(61)]
KINDS = ("list", "arrow", "files", "stream", "mapped stream", "parquet")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr("hf_msae.data.shuffling.BLOCK_ROWS", 8)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, Documents]:
    folder = tmp_path_factory.mktemp("shuffling")
    rows = [{"text": text} for text in TEXTS]
    (folder / "texts").mkdir()
    (folder / "texts" / "1.txt").write_text("\n\n\n".join(TEXTS[:20]) + "\n\n")
    (folder / "texts" / "2.txt").write_text("<|endoftext|>" + "<|endoftext|>\n<|endoftext|>".join(TEXTS[20:40]))
    (folder / "texts" / "3.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows[40:50]))
    (folder / "texts" / "4.json").write_text(json.dumps(rows[50:]))
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(folder / "one.parquet")
    return {
        "list": as_documents(TEXTS),
        "arrow": as_documents(dataset),
        "files": load_documents(folder / "texts"),
        "stream": as_documents(dataset.to_iterable_dataset(num_shards=3)),
        "mapped stream": as_documents(dataset.to_iterable_dataset().map(lambda row: row)),
        "parquet": load_documents(folder / "one.parquet"),
    }


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(0, 62), seed=st.integers(0, 99), world_size=st.integers(1, 3))
def test_each_once_dealt_out_and_resumed(stored, kind, stop, seed, world_size):
    whole = list(stored[kind].shuffle(seed))
    assert sorted(whole) == sorted(TEXTS)
    assert list(stored[kind].shuffle(seed)) == whole
    for rank in range(world_size):
        part = stored[kind].shuffle(seed).shard(rank, world_size)
        reader = iter(part)
        seen = [text for _, text in zip(range(stop), reader, strict=False)]
        state = json.loads(json.dumps(part.state_dict()))
        again = stored[kind].shuffle(seed).shard(rank, world_size)
        again.load_state_dict(state)
        assert seen + list(again) == whole[rank::world_size]


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_give_other_orders(stored, kind):
    orders = {tuple(stored[kind].shuffle(seed)) for seed in range(6)}
    assert len(orders) == 6
    assert tuple(TEXTS) not in orders


@pytest.mark.parametrize("kind", ["list", "arrow", "files"])
def test_what_can_be_jumped_in_is_mixed_from_end_to_end(stored, kind):
    """The mean place of the first 20 documents of 40 orders is 30, with a standard deviation of 0.5."""
    orders = [list(stored[kind].shuffle(seed))[:20] for seed in range(40)]
    places = [TEXTS.index(text) for order in orders for text in order]
    assert abs(sum(places) / len(places) - 30) < 2.5


def test_bad_rows_keep_their_numbers_in_any_order(tmp_path):
    lines = [json.dumps({"text": text}) if i % 7 else "no json" for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    documents = load_documents(tmp_path / "a.jsonl")
    good = sorted(text for i, text in enumerate(TEXTS) if i % 7)
    assert sorted(documents.shuffle(3)) == good
    assert documents.unreadable == set(range(0, 61, 7))
    rows = datasets.Dataset.from_dict({"text": [text if i % 7 else None for i, text in enumerate(TEXTS)]})
    streamed = as_documents(rows.to_iterable_dataset())
    assert sorted(streamed.shuffle(3)) == good
    assert streamed.unreadable == set(range(0, 61, 7))


def test_a_stream_that_fails_in_a_block_loses_and_repeats_nothing():
    failures = [3, 17, 17, 40]

    def rows():
        for index, text in enumerate(TEXTS):
            if index in failures:
                failures.remove(index)
                raise ConnectionResetError(f"at row {index}")
            yield {"text": text}

    source = StreamSource(datasets.IterableDataset.from_generator(rows), retry_waits=())
    documents = Documents(source, column="text", description="it").shuffle(1)
    reader, read = iter(documents), []
    while len(read) < len(TEXTS):
        try:
            read.append(next(reader))
        except DatasetError:
            assert failures != [3, 17, 17, 40]
    assert failures == []
    assert read == list(Documents(source, column="text", description="it").shuffle(1))


def test_a_block_ends_by_size_too(monkeypatch):
    monkeypatch.setattr("hf_msae.data.shuffling.BLOCK_ROWS", 10**6)
    monkeypatch.setattr("hf_msae.data.shuffling.BLOCK_BYTES", 150)
    taken = []

    def rows():
        for text in TEXTS:
            taken.append(text)
            yield {"text": text}

    documents = as_documents(datasets.IterableDataset.from_generator(rows)).shuffle(0)
    taken.clear()
    next(iter(documents))
    assert 150 <= sum(map(len, taken)) < 200
