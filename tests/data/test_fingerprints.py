"""Which data is the same, and which is not."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from hf_msae.data import DatasetError, Split, as_documents, differences, fingerprint, load_documents
from hf_msae.data.fingerprints import PIECE_BYTES

TEXTS = [f"document {number} of some" for number in range(300)]


def write(folder: Path, kind: str, texts: list[str], separator: str = "\n\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"texts.{kind}"
    if kind == "txt":
        path.write_text(separator.join(texts))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text, "other": text[::-1]}) + "\n" for text in texts))
    elif kind == "json":
        path.write_text(json.dumps([{"text": text, "other": text[::-1]} for text in texts]))
    else:
        table = pyarrow.table({"text": texts, "other": [text[::-1] for text in texts]})
        pyarrow.parquet.write_table(table, path, row_group_size=50)
    return path


def same(one, other) -> bool:
    first, second = fingerprint(one), fingerprint(other)
    assert json.loads(json.dumps(first)) == first  # a checkpoint holds it as JSON
    assert (first == second) == (differences(first, second) == "")
    return first == second


CHANGES = {
    "another document": lambda texts: [*texts[:150], "another one", *texts[151:]],
    "same sizes": lambda texts: [*texts[:1], texts[1].replace("1", "2"), *texts[2:]],
    "one less": lambda texts: texts[:-1],
    "one more": lambda texts: [*texts, "one more"],
    "another order": lambda texts: texts[::-1],
    "others": lambda texts: [text.upper() for text in texts],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet"])
def test_moved_files_are_the_same_and_changed_ones_are_not(tmp_path, kind, change):
    path = write(tmp_path / "here", kind, TEXTS)
    moved = write(tmp_path / "there", kind, TEXTS).rename(tmp_path / "there" / f"new name.{kind}")
    changed = write(tmp_path / "changed", kind, CHANGES[change](TEXTS))
    assert same(load_documents(path), load_documents(moved))
    assert same(load_documents(path).without(Split(0.2, 0.1)).shuffle(3), load_documents(tmp_path / "here"))
    assert not same(load_documents(path), load_documents(changed))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "hold",
    [
        pytest.param(list, id="list"),
        pytest.param(lambda texts: datasets.Dataset.from_dict({"text": texts}), id="Dataset"),
        pytest.param(lambda texts: [[{"role": "user", "content": text}] for text in texts], id="chats"),
    ],
)
def test_what_is_in_memory_is_told_by_its_rows(hold, change):
    # Of more rows than are looked at, a change in the middle may go unseen; length, ends and a share are seen.
    texts = TEXTS if change not in ("another document", "same sizes") else TEXTS[:200]
    assert same(hold(texts), hold(texts))
    assert not same(hold(texts), hold(CHANGES[change](texts)))


@pytest.mark.parametrize("change", ["same sizes", "another order", "others"])
def test_streams_are_told_by_their_first_rows(change):
    def stream(texts):
        return datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in texts))

    assert same(stream(TEXTS), stream(TEXTS))
    assert not same(stream(TEXTS), stream(CHANGES[change](TEXTS)))


def test_another_column_split_separator_or_kind_is_other_data(tmp_path):
    path = write(tmp_path / "a", "jsonl", TEXTS)
    assert not same(load_documents(path), load_documents(path, text_column="other"))
    plain = write(tmp_path / "b", "txt", TEXTS, "##")
    assert not same(load_documents(plain, separator="##"), load_documents(plain, separator="#"))
    write(tmp_path / "c", "jsonl", TEXTS).rename(tmp_path / "c" / "train.jsonl")
    write(tmp_path / "c", "jsonl", TEXTS[:50]).rename(tmp_path / "c" / "test.jsonl")
    assert not same(load_documents(tmp_path / "c", split="train"), load_documents(tmp_path / "c", split="test"))
    words = differences(fingerprint(load_documents(path)), fingerprint(TEXTS))
    assert "kind: 'text files' then, 'documents' now" in words
    assert "1 files of" in words
    assert "300 documents" in words


def test_a_large_file_is_told_by_pieces_to_its_end(tmp_path):
    lines = [json.dumps({"text": str(number) * 50}) + "\n" for number in range(20_000)]
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text("".join(lines))
    assert path.stat().st_size > 20 * PIECE_BYTES
    other.write_text("".join([*lines[:-1], lines[-1].replace("1", "2")]))
    assert path.stat().st_size == other.stat().st_size
    assert differences(fingerprint(load_documents(path)), fingerprint(load_documents(other))) == (
        "other contents of the same size"
    )


def test_rows_with_things_that_are_no_json_and_rows_that_fail():
    class Picture:
        pass

    class Rows(list):
        def __getitem__(self, index):
            if index == 1:
                raise RuntimeError("no row")
            return super().__getitem__(index)

    assert same([Picture(), "a", Picture()], [Picture(), "a", Picture()])
    assert same(Rows("abc"), Rows("axc"))
    assert not same(Rows("abc"), Rows("abd"))


# A place in other data


def positions(kind: str, folder: Path) -> dict:
    documents = load_documents(write(folder, kind, TEXTS))
    reader = iter(documents)
    for _ in range(37):
        next(reader)
    return documents.state_dict()


# A byte and an item's number look alike, and so do rows' numbers in two files: there fingerprints tell them apart.
@pytest.mark.parametrize(
    ("kind", "other"),
    [
        (kind, other)
        for kind in ("txt", "jsonl", "json", "parquet")
        for other in ("txt", "jsonl", "parquet")
        if ("parquet" in {kind, other} and kind != other) or (kind in ("txt", "jsonl") and other != "parquet")
    ],
)
def test_a_place_of_other_data_is_refused_at_once(tmp_path, kind, other, caplog):
    state = positions(kind, tmp_path / "then")
    now = load_documents(write(tmp_path / "now", other, ["z" * 7 + text for text in TEXTS]))
    now.load_state_dict(state)
    with pytest.raises(DatasetError, match="was read before"):
        next(iter(now))
    assert "Trying the same row again" not in caplog.text


@pytest.mark.parametrize("offset", range(1, 60))
def test_no_place_within_a_line_is_taken(tmp_path, offset):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "abcdef"}\n{"text": "ghijkl"}\n{"text": "mnopqr"}\n')
    documents = load_documents(lines)
    documents.load_state_dict({**documents.state_dict(), "position": [0, offset]})
    if offset in (19, 38, 57):
        assert list(documents) == ["abcdef", "ghijkl", "mnopqr"][offset // 19 :]
    else:
        with pytest.raises(DatasetError, match="not where a document begins"):
            next(iter(documents))


@pytest.mark.parametrize("error", [TypeError, KeyError, ValueError, pyarrow.ArrowInvalid, AttributeError])
def test_errors_that_no_network_causes_are_told_at_once(error, caplog):
    def rows():
        yield from ({"text": text} for text in TEXTS[:5])
        raise error("broken")

    documents = as_documents(datasets.IterableDataset.from_generator(rows))
    reader = iter(documents)
    assert [next(reader) for _ in range(5)] == TEXTS[:5]
    with pytest.raises(DatasetError, match=f"{error.__name__}: .*broken.*reading again would give the same"):
        next(reader)
    assert "Trying the same row again" not in caplog.text
