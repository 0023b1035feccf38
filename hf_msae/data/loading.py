"""Opening data: Python objects, files and folders on this machine, data sets on the Hub."""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import httpx

from hf_msae.data.documents import Documents, DocumentsLike
from hf_msae.data.rows import find_column
from hf_msae.data.sources import DatasetError, SequenceSource, Source, StreamSource, UnreadableRow
from hf_msae.data.text_files import FileSource

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".jsonl", ".json")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
SPLITS = {name: split for split, names in SPLIT_NAMES.items() for name in names}
# A column is looked for in the first row that can be read of so many.
FIRST_ROWS = 100
# A file's name tells a split where it is the split's name and, at most, numbers: `train-00001-of-00004`, `test_2`.
NAME_OF_SPLIT = re.compile(rf"({'|'.join(SPLITS)})([-_.]?(\d+|of))*", re.IGNORECASE)


def as_documents(data: DocumentsLike, *, text_column: str = "text", messages_column: str | None = None) -> Documents:
    """`Documents` over a Python object.

    Args:
        data: `Documents`, a `datasets.Dataset` or `IterableDataset`, or any `collections.abc.Sequence` of strings, of
            chats or of rows (dicts).
        text_column: as in `load_documents`; used where `data` has columns.
        messages_column: as there.

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
        raise DatasetError(
            f"a {type(data).__name__} has several splits ({', '.join(map(str, data))}); pass one: data['train']"
        )
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
        split: the split. In a folder, files belong to the split that they, or a folder in it, are called after
            (`train-0001.jsonl`, `test.txt`, `validation/a.txt`), all others to `train`; what is left out is logged.
        revision: branch, tag or commit of a Hub dataset.
        text_column: the column with the text. Where it is missing and there is a column `messages`, `conversations`
            (chats, or their JSON) or `input_ids` (documents that were tokenized already), that one is read.
        messages_column: the column with chats; takes precedence over `text_column`. A column `tools` beside it
            is given to the chat template.
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
    wanted = SPLITS.get(split, split)
    chosen = [file for file, found in split_of.items() if (found or "train") == wanted]
    if not chosen:
        raise DatasetError(
            f"the folder {path} has no split {split!r}; its file names tell: {', '.join(known) or 'train'}"
        )
    if len(chosen) < len(files):
        others = Counter(found or "train" for found in split_of.values() if (found or "train") != wanted)
        logger.warning(
            "Reading %d of the %d files of %s, as the split %r. By their names the others are: %s. Rename those that "
            "are not, or read another split.",
            *(len(chosen), len(files), path, split),
            ", ".join(f"{name} ({count})" for name, count in sorted(others.items())),
        )
    return chosen


def _split_of(file: Path) -> str | None:
    """The split that a folder of the file or its name is called after, if any; `unit-test-notes` is none."""
    for part in (*file.parent.parts, file.stem):
        found = NAME_OF_SPLIT.fullmatch(part)
        if found:
            return SPLITS[found.group(1).lower()]
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
    """`Documents` over the column that holds them.

    It is looked for in the first row that can be read, so that a wrong one is an error at once.
    """
    try:
        row = _first_row(source)
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
    column = find_column(row, description, text_column, messages_column)
    return Documents(source, column=column, chats=column != text_column, description=description)


def _first_row(source: Source) -> Any:
    """The first row that can be read, of those at the beginning; where none can, what is wrong with the first."""
    cursor, first = source.open(), None
    for _ in range(FIRST_ROWS):
        try:
            return cursor.read()
        except UnreadableRow as error:
            first = first or error
        except EOFError:
            raise first or EOFError from None
    raise first or EOFError
