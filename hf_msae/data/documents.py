"""Documents: an ordered, sharded, resumable sequence of texts and chats, whatever they are stored in.

Everything that reads text (training, evaluation, the cache) reads `Documents`, so the questions that a data set raises
are answered once: which column holds the text, which documents belong to which process, where a killed run goes on.
Document i of the whole belongs to rank i % world_size, so that every rank sees the same mixture, and a number of
documents at the front can be held out by skipping them before the deal.

A document that cannot be read is skipped, and never silently: its number goes to the log and into `unreadable`, which
a training run reports. (In the first document it is an error, because then all are probably like that.)
"""

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import httpx

from hf_msae.data.sources import (
    Cursor,
    DatasetError,
    FileSource,
    SequenceSource,
    Source,
    StreamSource,
    UnreadableRow,
)

logger = logging.getLogger(__name__)

Message = dict[str, Any]
Document = str | list[Message]

TEXT_SUFFIXES = (".txt", ".jsonl", ".json")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
CHAT_COLUMNS = ("messages", "conversations")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
SPLITS = {name: split for split, names in SPLIT_NAMES.items() for name in names}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# After so many documents in a row that cannot be read, something else is wrong.
MAX_UNREADABLE_IN_A_ROW = 100


class Documents:
    """Texts (`str`) and chats (lists of `{"role", "content"}`) in a fixed order.

    `iter()` starts a pass at the first document, or, once after `load_state_dict`, at the document after the one that
    was read last when the state was taken. `state_dict` tells the place of the pass that was started last.

    Args:
        source: the rows.
        column: the column of each row that holds the document; None where rows are documents.
        description: what a person would call this data, for error messages and model cards.

    Attributes:
        description: as given.
        num_documents: the number of documents in this view (after `skip` and `shard`), None where only reading would
            tell.
        unreadable: the numbers of documents that were skipped because they cannot be read, in all passes over all
            views of these documents.

    Raises (while reading) `DatasetError` where 100 documents in a row cannot be read, or a stream does not answer.
    """

    def __init__(self, source: Source, *, column: str | None = None, description: str) -> None:
        self.source = source
        self.column = column
        self.description = description
        self.start = 0
        self.rank = 0
        self.world_size = 1
        self.unreadable: set[int] = set()
        self._pass: _Pass | None = None
        self._resume: dict[str, Any] | None = None

    @property
    def num_documents(self) -> int | None:
        if self.source.num_documents is None:
            return None
        first = self.start + (self.rank - self.start) % self.world_size
        return len(range(first, self.source.num_documents, self.world_size))

    def skip(self, num_documents: int) -> "Documents":
        """A view without the first `num_documents` of the whole (counted before the deal among ranks).

        Raises `ValueError` on a shard, where "first" would mean another thing on every rank.
        """
        if num_documents < 0:
            raise ValueError(f"skip expects a number of documents of 0 or more, got {num_documents}")
        if self.world_size > 1:
            raise ValueError("skip documents before sharding them: documents.skip(n).shard(rank, world_size)")
        return self._view(start=self.start + num_documents)

    def shard(self, rank: int, world_size: int) -> "Documents":
        """The view of one of `world_size` ranks: documents i with i % world_size == rank."""
        if not 0 <= rank < world_size:
            raise ValueError(f"shard expects 0 <= rank < world_size, got rank {rank} of {world_size}")
        if self.world_size > 1:
            raise ValueError(
                f"these documents are already shard {self.rank} of {self.world_size}; shard the whole instead"
            )
        return self._view(start=self.start, rank=rank, world_size=world_size)

    def view(self) -> "Documents":
        """The same documents with a place of their own, so that reading them moves no other reader."""
        return self._view(start=self.start, rank=self.rank, world_size=self.world_size)

    def __iter__(self) -> "_Pass":
        state, self._resume = self._resume or self._first(), None
        self._pass = _Pass(self, state["next"], state["position"])
        return self._pass

    def state_dict(self) -> dict[str, Any]:
        """The place of the latest pass; JSON can hold it."""
        if self._resume is not None:
            return copy.deepcopy(self._resume)
        if self._pass is None:
            return self._first()
        return {"next": self._pass.next_index, "position": self._pass.cursor.position(), **self._view_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the next pass go on where `state` was taken.

        Raises `ValueError` where the state is of another view.
        """
        mine = self._view_state()
        theirs = {key: state[key] for key in mine}
        if mine != theirs:
            raise ValueError(
                f"the state was taken of documents with {theirs}, these are {mine}; "
                "resume with the same number of processes and the same held-out documents"
            )
        self._resume = copy.deepcopy(dict(state))

    def _first(self) -> dict[str, Any]:
        return {"next": self.start, "position": None, **self._view_state()}

    def _view_state(self) -> dict[str, int]:
        return {"start": self.start, "rank": self.rank, "world_size": self.world_size}

    def _view(self, *, start: int, rank: int = 0, world_size: int = 1) -> "Documents":
        view = Documents(self.source, column=self.column, description=self.description)
        view.start, view.rank, view.world_size = start, rank, world_size
        view.unreadable = self.unreadable
        return view

    def _skip_unreadable(self, index: int, error: UnreadableRow, in_a_row: int) -> None:
        """Note a document that is skipped; raises `DatasetError` where there were too many of them."""
        if in_a_row == MAX_UNREADABLE_IN_A_ROW:
            raise DatasetError(
                f"the last {in_a_row} documents of {self.description} cannot be read; of number {index}: {error}"
            ) from error
        if index not in self.unreadable:
            self.unreadable.add(index)
            logger.warning("Skipped document %d of %s, which cannot be read: %s", index, self.description, error)

    def _document(self, row: Any, index: int) -> Document:
        value: Any = row
        if self.column is not None:
            value = row.get(self.column) if isinstance(row, Mapping) else None
        if isinstance(value, str):
            return value
        if _is_chat(value):
            return [_message(message) for message in value]
        where = f"document {index} of {self.description}"
        where += "" if self.column is None else f", column {self.column!r},"
        found = "missing or null" if value is None else f"a {type(value).__name__}"
        raise UnreadableRow(
            f'{where} is {found}, expected a string or a list of messages {{"role": ..., "content": ...}}'
        )


class _Pass(Iterator[Document]):
    """One pass over a view: reads the documents of its rank and skips the others."""

    def __init__(self, documents: Documents, next_index: int, position: Any | None) -> None:
        self.documents = documents
        self.cursor: Cursor = documents.source.open(position)
        self.next_index = next_index
        if position is None:
            self.cursor.skip(next_index)

    def __next__(self) -> Document:
        in_a_row = 0
        while True:
            gap = (self.documents.rank - self.next_index) % self.documents.world_size
            self.cursor.skip(gap)
            self.next_index += gap
            try:
                return self._read()
            except EOFError:
                raise StopIteration from None
            except UnreadableRow as error:
                in_a_row += 1
                self.documents._skip_unreadable(self.next_index - 1, error, in_a_row)

    def _read(self) -> Document:
        # Counted once the row is read or passed over: a read that fails otherwise may be tried again.
        try:
            row = self.cursor.read()
        except UnreadableRow:
            self.next_index += 1
            raise
        self.next_index += 1
        return self.documents._document(row, self.next_index - 1)


def as_documents(data: Any, *, text_column: str = "text", messages_column: str | None = None) -> Documents:
    """`Documents` over a Python object.

    Args:
        data: `Documents`, a `datasets.Dataset` or `IterableDataset`, or any `collections.abc.Sequence` of strings, of
            chats or of rows (dicts).
        text_column, messages_column: as in `load_documents`; used where `data` has columns.

    Raises:
        DatasetError: `data` is something else, is empty or lacks the column.
    """
    if isinstance(data, Documents):
        return data
    if isinstance(data, str):
        raise DatasetError(
            f"a single string was given ({data[:40]!r}); to read a file or a dataset use load_documents"
        )
    kinds = {kind.__name__ for kind in type(data).__mro__ if kind.__module__.partition(".")[0] == "datasets"}
    if kinds & {"DatasetDict", "IterableDatasetDict"}:
        raise DatasetError(f"a {type(data).__name__} has several splits ({', '.join(data)}); pass one: data['train']")
    if "IterableDataset" in kinds:
        source: Source = StreamSource(data)
        description = "a streamed dataset"
    elif "Dataset" in kinds or isinstance(data, Sequence):
        source = SequenceSource(data)
        description = f"{len(data):,} documents in memory"
    else:
        raise DatasetError(
            f"cannot read documents from a {type(data).__name__}: expected a list or another Sequence, a "
            "datasets.Dataset or IterableDataset, or Documents. A generator cannot be resumed; wrap it in "
            "datasets.IterableDataset.from_generator."
        )
    return _with_column(source, description, text_column, messages_column)


def load_documents(
    dataset: str | Path,
    *,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    text_column: str = "text",
    messages_column: str | None = None,
    separator: str | None = None,
    streaming: bool = True,
) -> Documents:
    """Opens a data set by its path or its id on the Hub.

    Args:
        dataset: a .txt, .jsonl, .json or .parquet file, a folder of such files, a folder that `Dataset.save_to_disk`
            wrote, or the id of a dataset on the Hub.
        name: the configuration of a Hub dataset.
        split: the split. In a folder, files are assigned to splits by their names (`train-0001.jsonl`, `test.txt`,
            `validation/a.txt`); where no name tells, all are `train`.
        revision: branch, tag or commit of a Hub dataset.
        text_column: the column with the text. Where it is missing and there is a column `messages` or `conversations`,
            that one is read as chats.
        messages_column: the column with chats; takes precedence over `text_column`.
        separator: what stands between documents in .txt files; defaults to `<|endoftext|>` where the first megabyte of
            a file has it, else to blank lines.
        streaming: read parquet files and Hub datasets while they are used, instead of converting them to Arrow first.

    Raises:
        DatasetError: nothing is there, the split or the column is missing, the first rows cannot be read, or it is
            empty.
    """
    path = Path(dataset).expanduser()
    if path.exists():
        if name is not None or revision is not None:
            raise DatasetError(
                f"name={name!r} and revision={revision!r} are for Hub datasets, but {path} is here: "
                "leave them out, or rename what lies there to read the Hub's dataset"
            )
        source = _local_source(path, split, separator, streaming)
    else:
        source = _hub_source(str(dataset), name, split, revision, streaming)
    description = " ".join(part for part in (str(dataset), name, split) if part)
    return _with_column(source, description, text_column, messages_column)


def _local_source(path: Path, split: str, separator: str | None, streaming: bool) -> Source:
    if (path / "dataset_dict.json").exists():
        from datasets import load_from_disk

        splits = load_from_disk(str(path))
        if split not in splits:
            raise DatasetError(f"{path} has no split {split!r}; it has: {', '.join(splits)}")
        return SequenceSource(splits[split])
    if (path / "state.json").exists() and (path / "dataset_info.json").exists():
        from datasets import load_from_disk

        return SequenceSource(load_from_disk(str(path)))
    paths = _local_files(path, split)
    if all(file.suffix in TEXT_SUFFIXES for file in paths):
        return FileSource(paths, separator)
    if any(file.suffix in TEXT_SUFFIXES for file in paths):
        raise DatasetError(f"{path} mixes parquet with text files; give the path of the files of one kind")
    source = _datasets_source(str(path), "parquet", data_files=[str(file) for file in paths], streaming=streaming)
    if isinstance(source, StreamSource):
        source.files = paths
    return source


def _local_files(path: Path, split: str) -> list[Path]:
    """The data files of one split, in sorted order."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DatasetError(
                f"cannot read {path}: expected one of {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'!r}"
            )
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise DatasetError(f"the folder {path} holds no {', '.join(SUFFIXES)} file and is no saved datasets.Dataset")
    split_of = {file: _split_of(file.relative_to(path)) for file in files}
    known = sorted({found for found in split_of.values() if found})
    chosen = [file for file, found in split_of.items() if (found or "train") == SPLITS.get(split, split)]
    if not chosen:
        raise DatasetError(
            f"the folder {path} has no split {split!r}; its file names tell: {', '.join(known) or 'train'}"
        )
    return chosen


def _split_of(file: Path) -> str | None:
    """The split that a file's folders or its name tell, if any."""
    for part in (*file.parent.parts, file.stem):
        for word in re.split(r"[-_.]", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None


def _hub_source(dataset: str, name: str | None, split: str, revision: str | None, streaming: bool) -> Source:
    nothing = f"the path {Path(dataset).expanduser().absolute()} (nothing there)"
    if not HUB_ID.fullmatch(dataset) or dataset.endswith(SUFFIXES):
        raise DatasetError(
            f"cannot find {dataset!r}. Tried {nothing}; the Hub was not asked, because this is not the id of a Hub "
            "dataset (owner/name)"
        )
    tried = f"{nothing} and the Hub dataset {dataset!r}"
    source = _datasets_source(tried, dataset, name=name, split=split, revision=revision, streaming=streaming)
    if isinstance(source, StreamSource):
        source.commit = _commit(dataset, revision)
    return source


def _commit(dataset: str, revision: str | None) -> str | None:
    """Of a Hub dataset as it is read now; None where the Hub cannot tell, because it is read from the cache."""
    try:
        return HfApi().dataset_info(dataset, revision=revision).sha
    except (OSError, httpx.HTTPError):
        return None


def _datasets_source(tried: str, *args: Any, split: str = "train", streaming: bool, **kwargs: Any) -> Source:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_dataset(*args, split=split, streaming=streaming, **kwargs)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DatasetError(
            f"cannot load split {split!r} of the dataset. Tried {tried}: {type(error).__name__}: {error}. Check the "
            "spelling and the split, log in (`hf auth login`) for a private or gated dataset, or pass a local file."
        ) from error
    return StreamSource(loaded) if streaming else SequenceSource(loaded)


def _with_column(source: Source, description: str, text_column: str, messages_column: str | None) -> Documents:
    """`Documents` over the column that holds them, found in the first row; so that a wrong one is an error at once."""
    try:
        row = source.open().read()
    except EOFError:
        raise DatasetError(f"empty dataset: {description} has no document") from None
    except DatasetError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise DatasetError(
            f"cannot read the first document of {description}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(row, Mapping):
        return Documents(source, description=description)
    wanted = messages_column or text_column
    fallback = [] if messages_column else [column for column in CHAT_COLUMNS if column in row]
    if wanted in row:
        return Documents(source, column=wanted, description=description)
    if fallback:
        return Documents(source, column=fallback[0], description=description)
    texts = [column for column, value in row.items() if isinstance(value, str)]
    chats = [column for column, value in row.items() if _is_chat(value)]
    raise DatasetError(
        f"{description} has no column {wanted!r}. Its columns: {', '.join(map(str, row))}. "
        f"With text (text_column=...): {', '.join(texts) or 'none'}. "
        f"With chats (messages_column=...): {', '.join(chats) or 'none'}."
    )


def _is_chat(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(
        isinstance(m, Mapping) and ({"role", "content"} <= m.keys() or {"from", "value"} <= m.keys()) for m in value
    )


def _message(message: Mapping[str, Any]) -> Message:
    """A message as chat templates want it; the ShareGPT form has `from` and `value`."""
    if "role" in message:
        return dict(message)
    sender = message["from"]
    return {"role": SHAREGPT_ROLES.get(sender, sender), "content": message["value"]}
