"""What data is, in a few hundred bytes: whether a run that goes on reads what it read before.

A place in data (a row's number, a byte offset, a stream's state) means nothing in other data: it lies within a line
there, or before documents that were held out. So a checkpoint keeps a fingerprint of what it was trained on and one of
what it was measured on. They come from contents, not from names: data that was moved to another folder is the same.
Only parts are read (sizes, and pieces from the beginning to the end), so that a terabyte takes no longer than a
gigabyte; a change that keeps every size and falls between the pieces goes unseen.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from hf_msae.data.documents import Documents, DocumentsLike
from hf_msae.data.loading import as_documents
from hf_msae.data.sources import Cursor, SequenceSource, StreamSource, UnreadableRow
from hf_msae.data.text_files import FileSource

# Of a file: this many pieces of so many bytes, evenly spaced, the first and the last bytes among them.
PIECES, PIECE_BYTES = 8, 1 << 14
# Of a sequence: so many rows, evenly spaced. Of a stream: its first rows.
SEQUENCE_ROWS, STREAM_ROWS = 256, 16


def fingerprint(data: DocumentsLike) -> dict[str, Any]:
    """What tells this data from other data; JSON can hold it.

    Args:
        data: `Documents`, or what `as_documents` takes. Of a stream the first rows are read, which ends any pass over
            it: ask before it is used.
    """
    documents = as_documents(data)
    return {**_of_source(documents), "column": documents.column}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, what of two fingerprints is not the same; empty where all is.

    A commit that is not known in both says nothing.
    """
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    if None in (then.get("commit"), now.get("commit")):
        keys = [key for key in keys if key != "commit"]
    told = [f"{key}: {then.get(key)!r} then, {now.get(key)!r} now" for key in keys if key != "sha256"]
    return "; ".join(told) or ("other contents of the same size" if keys else "")


def _of_source(documents: Documents) -> dict[str, Any]:
    source = documents.source
    if isinstance(source, FileSource):
        return {"kind": "text files", **of_files(source.paths), "separator": source.separator}
    if isinstance(source, SequenceSource):
        rows = len(source.rows)
        chosen = sorted({index * (rows - 1) // (SEQUENCE_ROWS - 1) for index in range(SEQUENCE_ROWS)})
        return {"kind": "documents", "size": f"{rows:,} documents", **_of_rows(documents, _picked(source, chosen))}
    if isinstance(source, StreamSource) and source.files:
        return {"kind": "parquet files", **of_files(source.files)}
    commit = {"commit": source.commit} if isinstance(source, StreamSource) and source.commit else {}
    return {"kind": "a stream", **commit, **_of_rows(documents, islice(_read(source.open()), STREAM_ROWS))}


def of_files(paths: Sequence[Path]) -> dict[str, Any]:
    """What tells files from others: their sizes and pieces of them, in their order, whatever their names."""
    digest, total = hashlib.sha256(), 0
    for path in paths:
        size = path.stat().st_size
        total += size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for number in range(PIECES):
                file.seek(max(0, size - PIECE_BYTES) * number // (PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    return {"size": f"{len(paths):,} files of {total:,} bytes", "sha256": digest.hexdigest()}


def of_digests(digests: Sequence[str]) -> dict[str, Any]:
    """What tells files from others whose contents are known by a digest of each, in their order."""
    return {"size": f"{len(digests):,} files", "sha256": hashlib.sha256("\n".join(digests).encode()).hexdigest()}


def _of_rows(documents: Documents, rows: Iterable[Any]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for row in rows:
        value = row.get(documents.column) if documents.column is not None and isinstance(row, Mapping) else row
        # Of what is no JSON (a picture beside the text) the type alone: its words may hold an address in memory.
        digest.update(json.dumps(value, sort_keys=True, default=lambda other: type(other).__name__).encode() + b"\n")
    return {"sha256": digest.hexdigest()}


def _picked(source: SequenceSource, chosen: Sequence[int]) -> Iterable[Any]:
    for index in chosen:
        yield from islice(_read(source.open(index)), 1)


def _read(cursor: Cursor) -> Iterable[Any]:
    """A cursor's rows; None for one that cannot be read."""
    while True:
        try:
            yield cursor.read()
        except EOFError:
            return
        except UnreadableRow:
            yield None
