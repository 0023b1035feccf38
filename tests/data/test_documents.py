"""Documents: the same whatever they are stored in, dealt out without loss, and resumed at exactly the next one."""

import json
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_msae.data import DatasetError, Documents, Split, as_documents, load_documents
from hf_msae.data.hash_split import hash_value
from hf_msae.data.sources import StreamSource
from hf_msae.errors import InputError

TEXTS = [f"document {i}\nwith ünïcode and a second line" + " word" * (i % 5) for i in range(23)]
CHATS = [[{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"answer {i}"}] for i in range(5)]
KINDS = ["list", "txt", "paragraphs", "txt folder", "jsonl", "json", "json lines", "parquet", "folder", "disk", "dict"]


@pytest.fixture(scope="session")
def stored(tmp_path_factory) -> dict[str, Documents]:
    """`TEXTS` in every form that can be read."""
    root = tmp_path_factory.mktemp("stored")
    rows = [{"label": i, "text": text} for i, text in enumerate(TEXTS)]
    dataset = datasets.Dataset.from_list(rows)
    (root / "a.txt").write_text("\n<|endoftext|>\n".join(TEXTS), encoding="utf-8")
    (root / "b.txt").write_text("\n\n  \n".join(TEXTS) + "\n\n", encoding="utf-8")
    (root / "texts").mkdir()
    (root / "texts" / "1.txt").write_text("<|endoftext|>".join(TEXTS[:9]) + "<|endoftext|>", encoding="utf-8")
    (root / "texts" / "2.txt").write_text("\n\n".join(TEXTS[9:]), encoding="utf-8")
    lines = "\n".join(json.dumps(row) for row in rows)
    (root / "a.jsonl").write_text(lines + "\n", encoding="utf-8")
    (root / "lines.json").write_text(lines, encoding="utf-8")
    (root / "array.json").write_text(" " + json.dumps(rows), encoding="utf-8")
    (root / "parquet").mkdir()
    dataset.select(range(10)).to_parquet(root / "parquet" / "train-0.parquet")
    dataset.select(range(10, 23)).to_parquet(root / "parquet" / "train-1.parquet")
    dataset.select(range(2)).to_parquet(root / "parquet" / "test-0.parquet")
    dataset.to_parquet(root / "one.parquet")
    dataset.save_to_disk(root / "disk")
    datasets.DatasetDict({"train": dataset, "test": dataset.select(range(3))}).save_to_disk(root / "dict")
    paths = [
        "a.txt",
        "b.txt",
        "texts",
        "a.jsonl",
        "array.json",
        "lines.json",
        "one.parquet",
        "parquet",
        "disk",
        "dict",
    ]
    return {"list": as_documents(TEXTS)} | {
        kind: load_documents(root / path) for kind, path in zip(KINDS[1:], paths, strict=True)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_same_documents_twice(stored, kind):
    documents = stored[kind].view()
    assert list(documents) == TEXTS
    assert list(documents) == TEXTS
    assert documents.num_documents == (23 if kind in ("list", "disk", "dict") else None)


def test_python_objects_give_the_same_documents():
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    assert list(as_documents(dataset)) == TEXTS
    assert list(as_documents(dataset.to_iterable_dataset(num_shards=3))) == TEXTS
    assert list(as_documents([{"body": text} for text in TEXTS], text_column="body")) == TEXTS
    documents = as_documents(TEXTS)
    assert as_documents(documents) is documents


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(
    stop=st.integers(0, 24),
    seed=st.none() | st.integers(0, 9),
    share=st.sampled_from([0, 0.3]),
    rank=st.integers(0, 2),
)
def test_resumed_equals_uninterrupted(stored, kind, stop, seed, share, rank):
    def fresh() -> Documents:
        view = stored[kind].without(Split(share, share))
        return (view if seed is None else view.shuffle(seed)).shard(rank, 3)

    expected = list(fresh())
    if seed is None:
        assert expected == [text for text in TEXTS[rank::3] if not Split(share, share).holds(hash_value(text))]
    documents = fresh()
    reader = iter(documents)
    seen = [text for _, text in zip(range(stop), reader, strict=False)]
    state = json.loads(json.dumps(documents.state_dict()))
    resumed = fresh()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert seen + list(resumed) == expected
    assert list(resumed) == expected  # only the first pass after loading is a resumed one


@settings(max_examples=40, deadline=None)
@given(
    total=st.integers(1, 30),
    split=st.builds(Split, st.floats(0, 0.5), st.floats(0, 0.5)),
    world_size=st.integers(1, 5),
)
def test_shards_are_a_partition_of_what_is_not_held_out(total, split, world_size):
    texts = [str(i) for i in range(total)]
    shards = [as_documents(texts).without(split).shard(rank, world_size) for rank in range(world_size)]
    given_out = [list(shard) for shard in shards]
    assert sum(shard.num_documents for shard in shards) == total
    assert sorted(text for part in given_out for text in part) == sorted(
        t for t in texts if not split.holds(hash_value(t))
    )
    assert all(int(text) % world_size == rank for rank, part in enumerate(given_out) for text in part)


def test_text_needs_no_datasets(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes `import datasets` an ImportError
    for documents in (
        load_documents(tmp_path / "a.txt"),
        load_documents(tmp_path / "a.jsonl"),
        as_documents(("one", "two")),
    ):
        assert list(documents) == ["one", "two"]


def test_two_passes_over_a_list_do_not_disturb_each_other():
    documents = as_documents(TEXTS)
    assert list(zip(documents, documents, strict=True)) == list(zip(TEXTS, TEXTS, strict=True))


def test_an_overtaken_pass_over_a_stream_refuses_to_tell_a_wrong_place():
    documents = as_documents(datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset())
    next(iter(documents))
    next(iter(documents.view()))
    with pytest.raises(RuntimeError, match="a second pass over this streamed dataset has begun"):
        documents.state_dict()


def test_the_state_of_another_shard_is_refused():
    state = as_documents(TEXTS).shard(0, 2).state_dict()
    with pytest.raises(ValueError, match="same number of processes"):
        as_documents(TEXTS).shard(0, 3).load_state_dict(state)


def test_views_refuse_what_would_mean_something_else():
    shard = as_documents(TEXTS).shard(0, 2)
    with pytest.raises(ValueError, match="already shard 0 of 2"):
        shard.shard(0, 2)
    with pytest.raises(ValueError, match="got rank 2 of 2"):
        as_documents(TEXTS).shard(2, 2)


def test_a_separator_can_be_chosen(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo ### three###\n###")
    assert list(load_documents(tmp_path / "a.txt", separator="###")) == ["one\r\n\r\ntwo", "three"]
    assert list(load_documents(tmp_path / "a.txt")) == ["one", "two ### three###\n###"]


def test_a_separator_across_the_border_of_two_reads_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_msae.data.text_files.CHUNK_BYTES", 7)
    (tmp_path / "a.txt").write_text("abcd<|sep|>efghijklmnop<|sep|>q", encoding="utf-8")
    assert list(load_documents(tmp_path / "a.txt", separator="<|sep|>")) == ["abcd", "efghijklmnop", "q"]


def test_chats_are_found_and_sharegpt_is_translated(tmp_path):
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": c, "id": 1}) for c in CHATS))
    assert list(load_documents(tmp_path / "chat.jsonl")) == CHATS
    assert list(as_documents(datasets.Dataset.from_dict({"chat": CHATS}), messages_column="chat")) == CHATS
    assert list(as_documents(CHATS)) == CHATS
    sharegpt = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}]
    assert list(as_documents(sharegpt)) == [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    ]
    both = [{"text": "plain", "messages": CHATS[0]}]
    assert list(as_documents(both)) == ["plain"]
    assert list(as_documents(both, messages_column="messages")) == [CHATS[0]]


def test_file_names_tell_the_split(tmp_path):
    for name in ("train-00.txt", "train-01.txt", "valid.txt"):
        (tmp_path / name).write_text(name)
    assert list(load_documents(tmp_path)) == ["train-00.txt", "train-01.txt"]
    assert list(load_documents(tmp_path, split="validation")) == ["valid.txt"]
    assert list(load_documents(tmp_path / "valid.txt")) == ["valid.txt"]
    with pytest.raises(DatasetError, match=r"no split 'test'; its file names tell: train, validation"):
        load_documents(tmp_path, split="test")


def test_words_in_file_names_leave_no_file_out_and_splits_are_counted(tmp_path, caplog):
    words = ["unit_test_", "dev-blog-", "val.notes", "a-test", "latest", "evaluation"]
    names = [f"{word}{i}" for i, word in enumerate(words)]
    for name in names:
        (tmp_path / f"{name}.txt").write_text(name)
    assert sorted(load_documents(tmp_path)) == sorted(names)
    assert caplog.text == ""
    (tmp_path / "validation").mkdir()
    for name in ("test-00000-of-00002", "test-00001-of-00002", "validation/x"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert sorted(load_documents(tmp_path)) == sorted(names)
    assert "Reading 6 of the 9 files" in caplog.text
    assert "test (2), validation (1)" in caplog.text
    assert len(list(load_documents(tmp_path, split="test"))) == 2


def test_missing_data_says_what_was_tried(tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match=r"nothing.*\(nothing there\); the Hub was not asked"):
        load_documents(tmp_path / "nothing.txt")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DatasetError, match=r"Tried the path .*no-owner/no-name \(nothing there\) and the Hub"
    ) as caught:
        load_documents("no-owner/no-name")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_missing_column_lists_the_columns_and_their_kinds():
    rows = [{"body": "words", "n": 3, "talk": CHATS[0]}]
    message = r"no column 'text'. Its columns: body, n, talk. With text .*: body. With chats .*: talk"
    with pytest.raises(DatasetError, match=message):
        as_documents(rows)
    with pytest.raises(DatasetError, match="no column 'chat'"):
        as_documents([{"text": "x", "messages": CHATS[0]}], messages_column="chat")


def test_a_missing_split_lists_the_splits(stored, tmp_path):
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})})
    splits.save_to_disk(tmp_path / "dict")
    with pytest.raises(DatasetError, match="no split 'test'; it has: train"):
        load_documents(tmp_path / "dict", split="test")
    with pytest.raises(DatasetError, match=r"several splits \(train\)"):
        as_documents(splits)


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        (b"", ".txt", "empty dataset"),
        (b"\n \n", ".jsonl", "empty dataset"),
        (b"[]", ".json", "empty dataset"),
        (b"not json", ".jsonl", "the line at byte 0 is not JSON"),
        (b"[1, 2", ".json", "begins like a JSON array but is not one"),
        (b"3", ".jsonl", "holds a int at offset 0, expected an object"),
        (b"caf\xe9", ".txt", "is not UTF-8 text in the document that begins at byte 0"),
        (b"not parquet", ".parquet", "Parquet"),
        (b"a,b", ".csv", r"expected one of \.txt, \.jsonl, \.json, \.parquet, got '\.csv'"),
    ],
)
def test_unreadable_files_are_errors_at_once(tmp_path, content, suffix, message):
    path: Path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        load_documents(path)


def test_folders_that_cannot_be_read_are_errors(tmp_path):
    with pytest.raises(DatasetError, match=r"holds no \.txt"):
        load_documents(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DatasetError, match="revision='main' are for Hub datasets"):
        load_documents(tmp_path, revision="main")
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(DatasetError, match="mixes parquet with text files"):
        load_documents(tmp_path)


def test_values_that_are_no_documents_are_skipped_and_named(caplog):
    documents = as_documents([{"text": "a"}, {"text": None}, None, {"text": "b"}])
    assert list(documents) == ["a", "b"]
    assert "document 1 of 4 documents in memory, column 'text', is missing or null" in caplog.text
    documents = as_documents(["a", 3, "b", "c"])
    assert list(documents.shard(1, 2)) == ["c"]
    assert "document 1 of 4 documents in memory is a int, expected a string, a list of messages" in caplog.text
    assert documents.unreadable == {1}  # of all views


def test_lines_that_cannot_be_read_are_skipped_and_counted_once(tmp_path, caplog):
    path: Path = tmp_path / "texts.jsonl"
    path.write_bytes(b'{"text": "a"}\nno json\n{"text": "b"}\n3\n{"text": "caf\xe9"}\n{"text": "c"}\n')
    documents = load_documents(path)
    assert list(documents) == list(documents) == ["a", "b", "c"]
    assert documents.unreadable == {1, 3, 4}
    assert caplog.text.count("Skipped document") == 3
    reader = iter(documents)
    assert [next(reader), next(reader)] == ["a", "b"]
    documents.load_state_dict(documents.state_dict())
    assert list(documents) == ["c"]


@pytest.mark.parametrize("bad", [150, 500])
def test_bad_documents_in_a_row_end_nothing(bad):
    rows = [{"text": "a"}] * 600 + [{"text": None}] * bad + [{"text": "b"}] * 600
    documents = as_documents(rows)
    assert list(documents) == ["a"] * 600 + ["b"] * 600
    assert documents.unreadable == set(range(600, 600 + bad))


def test_documents_of_which_most_cannot_be_read_are_an_error():
    rows = [{"text": "a" if i % 5 else None} for i in range(3000)] + [{"text": None}] * 7 + [{"text": "b"}] * 2
    assert len(list(as_documents(rows))) == 2400 + 2
    with pytest.raises(DatasetError, match=r"501 of the last 1,000 documents .* cannot be read; of number .*null"):
        list(as_documents([{"text": "a"}] * 5000 + [{"text": None}] * 600))


def failing_stream(failures: list[int]) -> datasets.IterableDataset:
    """Ten rows; reading row i fails as often as `failures` has i."""

    def rows():
        for index in range(10):
            if index in failures:
                failures.remove(index)
                raise ConnectionResetError(f"at row {index}")
            yield {"text": f"t{index}"}

    return datasets.IterableDataset.from_generator(rows)


def test_a_stream_that_fails_now_and_then_loses_and_repeats_nothing(caplog):
    documents = Documents(StreamSource(failing_stream([0, 3, 3, 9]), (0.0, 0.01)), column="text", description="it")
    assert list(documents) == [f"t{index}" for index in range(10)]
    assert documents.unreadable == set()
    assert caplog.text.count("Trying the same row again") == 4
    assert "ConnectionResetError: at row 3" in caplog.text


def test_a_stream_that_keeps_failing_ends_in_words_and_resumes():
    failures = [4, 4, 4]
    documents = Documents(StreamSource(failing_stream(failures), (0.0, 0.0)), column="text", description="it")
    reader = iter(documents)
    assert [next(reader) for _ in range(4)] == ["t0", "t1", "t2", "t3"]
    with pytest.raises(DatasetError, match=r"ConnectionResetError: at row 4.*2 further attempts.*resume"):
        next(reader)
    documents.load_state_dict(documents.state_dict())
    assert next(iter(documents)) == "t4"


def test_objects_that_are_no_documents_are_named():
    with pytest.raises(DatasetError, match="use load_documents"):
        as_documents("stories.txt")
    with pytest.raises(DatasetError, match="cannot read documents from a generator"):
        as_documents(text for text in TEXTS)


def test_real_stories_are_split_at_end_of_text(shared_data):
    path = shared_data / "tinystories.txt"
    stories = list(load_documents(path))
    raw = path.read_text(encoding="utf-8")
    assert stories == [story.strip() for story in raw.split("<|endoftext|>") if story.strip()]
    assert len(stories) > 5000


def test_a_state_without_its_place_is_refused():
    documents = as_documents(TEXTS)
    next(iter(documents))
    state = documents.state_dict()
    del state["position"]
    with pytest.raises(InputError, match="damaged: it has no 'position'"):
        as_documents(TEXTS).load_state_dict(state)
