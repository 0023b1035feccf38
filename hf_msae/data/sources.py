"""Where rows lie and how to come back to one: sequences, text and JSON files, streamed `datasets`.

A `Source` opens a `Cursor`; a cursor reads rows in order, skips them, and tells its position as something that JSON
can hold, so that a run that was killed continues at exactly the next row. Text and JSON files are read here, with
their byte offsets, because that needs no dependency and jumps straight to the offset; everything else goes through
`datasets`, which keeps a state of its own. Rows are numbered from 0 in the order in which a source gives them, and
that order never changes.

A row that cannot be read (bytes that are no text, a line that is no JSON) is an `UnreadableRow`, after which a cursor
goes on with the next one. A stream comes over a network, which fails now and then, so it is opened again at the same
row after a while, a few times; errors of the data itself, or of the code that reads it, are told at once. A position
that cannot be one of this source (it is of another kind, or lies within a line) is refused.
"""

import io
import json
import logging
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from hf_msae.errors import InputError

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
CHUNK_BYTES = 1 << 20
# How long a stream that failed is left alone, before each further attempt to read the same row.
RETRY_WAITS_S = (0.5, 2.0, 8.0, 30.0)
# What no network causes.
NO_NETWORK_ERRORS = (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, ArithmeticError)


class DatasetError(InputError):
    """The documents asked for do not exist or are not what was said of them."""


class UnreadableRow(DatasetError):
    """One row cannot be read; those after it can."""


class Cursor(Protocol):
    """One pass over a source.

    number: of the row that was read last, in the order in which rows are stored; None where they come in that order.
    """

    number: int | None

    def read(self) -> Any:
        """The next row. Raises `EOFError` after the last, and `UnreadableRow` once for a row that is passed over."""

    def skip(self, count: int) -> None:
        """Passes over the next `count` rows (or as many as are left), without decoding them where that is possible."""

    def position(self) -> Any:
        """Where the next row begins, for `Source.open`; only numbers, strings, lists and dicts."""


class Source(Protocol):
    """Rows in a fixed order."""

    num_documents: int | None

    def open(self, position: Any | None = None) -> Cursor:
        """A pass from the beginning, or from a position that a cursor of this source has given."""


class SequenceSource:
    """Rows of anything with a length and an index; jumping costs nothing."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows
        self.num_documents: int | None = len(rows)

    def open(self, position: int | None = None) -> "SequenceCursor":
        if not isinstance(position, int | None):
            raise elsewhere(position, "a row's number")
        return SequenceCursor(self.rows, position or 0)


class SequenceCursor:
    number: int | None = None

    def __init__(self, rows: Sequence[Any], index: int) -> None:
        self.rows = rows
        self.index = index

    def read(self) -> Any:
        if self.index >= len(self.rows):
            raise EOFError
        self.index += 1
        try:
            return self.rows[self.index - 1]
        except Exception as error:  # whatever decodes the row, down to a user's own code, may fail in its own way
            raise UnreadableRow(f"row {self.index - 1} raises {type(error).__name__}: {error}") from error

    def skip(self, count: int) -> None:
        self.index += count

    def position(self) -> int:
        return self.index


class FileSource:
    """Rows of .txt, .jsonl and .json files, read in the order of `paths`.

    A .txt file gives rows `{"text": ...}`, split at `separator` (default: `<|endoftext|>` where the first megabyte of
    the file has it, else blank lines) and stripped of surrounding white space; pieces that are empty are no rows.
    """

    def __init__(self, paths: Sequence[Path], separator: str | None = None) -> None:
        self.paths = list(paths)
        self.separator = separator
        self.num_documents: int | None = None
        self._indexed: IndexedFiles | None = None

    def indexed(self) -> "IndexedFiles":
        """The rows as a sequence; the files are gone through once, when this is called first."""
        if self._indexed is None:
            self._indexed = IndexedFiles(self)
        return self._indexed

    def open(self, position: Sequence[int] | None = None) -> "FileCursor":
        position = [0, 0] if position is None else position
        if not isinstance(position, list | tuple) or [type(number) for number in position] != [int, int]:
            raise elsewhere(position, "a file's number and a byte in it")
        file_number, offset = position
        if file_number >= len(self.paths):
            raise elsewhere(position, f"a place in one of {len(self.paths)} files")
        return FileCursor(self, file_number, offset)


class FileCursor:
    number: int | None = None

    def __init__(self, source: FileSource, file_number: int, offset: int) -> None:
        self.source = source
        self.file_number = file_number
        self.offset = offset
        self.pieces: Iterator[tuple[Any, int]] | None = None
        self.parse: Callable[[Path, Any, int], Any] = _parse_text

    def read(self) -> Any:
        begin, piece = self._next_piece()
        return self.parse(self.source.paths[self.file_number], piece, begin)

    def skip(self, count: int) -> None:
        for _ in range(count):
            try:
                self._next_piece()
            except EOFError:
                return

    def position(self) -> list[int]:
        return [self.file_number, self.offset]

    def _next_piece(self) -> tuple[int, Any]:
        """The next undecoded row and the offset after the row before it."""
        while self.file_number < len(self.source.paths):
            if self.pieces is None:
                path = self.source.paths[self.file_number]
                self.pieces, self.parse = _open_pieces(path, self.offset, self.source.separator)
            for piece, end in self.pieces:
                begin, self.offset = self.offset, end
                return begin, piece
            if self.file_number == len(self.source.paths) - 1:
                break
            self.file_number, self.offset, self.pieces = self.file_number + 1, 0, None
        raise EOFError


class IndexedFiles(Sequence[Any]):
    """Rows of files in any order. Of a .json file that is one array the items are kept in memory."""

    def __init__(self, source: FileSource) -> None:
        self.source = source
        self.ends: list[array[int]] = []
        self.items: dict[int, list[Any]] = {}
        for number, path in enumerate(source.paths):
            layout = _layout(path, source.separator)
            found = list(layout.pieces(path.open("rb"), 0)) if layout.in_memory else []
            self.ends.append(array("Q", (end for _, end in found or layout.pieces(path.open("rb"), 0))))
            if layout.in_memory:
                self.items[number] = [item for item, _ in found]
        self.layouts = [_layout(path, source.separator) for path in source.paths]
        self.firsts = [0, *accumulate(map(len, self.ends))]

    def __len__(self) -> int:
        return self.firsts[-1]

    def __getitem__(self, row: Any) -> Any:
        number = bisect_right(self.firsts, row) - 1
        path, layout, place = self.source.paths[number], self.layouts[number], row - self.firsts[number]
        begin = self.ends[number][place - 1] if place else 0
        if layout.in_memory:
            return layout.parse(path, self.items[number][place], begin)
        with path.open("rb") as handle:
            handle.seek(begin)
            contents = handle.read(self.ends[number][place] - begin)
        piece, _ = next(layout.pieces(io.BytesIO(contents), begin))
        return layout.parse(path, piece, begin)


class StreamSource:
    """Rows of a `datasets.IterableDataset`, whose own `state_dict` is the position.

    A `datasets` stream has one state for all iterators over it, so only the pass that was opened last can tell its
    position. A stream that was shuffled with a buffer resumes without the buffer's rows (a limit of `datasets`).

    Where reading fails, the row is tried again after each of `retry_waits` (seconds).

    Attributes:
        files: what it reads from this machine, where that is known.
        commit: of the Hub's dataset, where that is known.
    """

    def __init__(self, dataset: Any, retry_waits: Sequence[float] = RETRY_WAITS_S) -> None:
        self.dataset = dataset
        self.retry_waits = retry_waits
        self.files: Sequence[Path] = ()
        self.commit: str | None = None
        self.num_documents: int | None = None
        self.start = dataset.state_dict()
        self.latest: StreamCursor | None = None

    def open(self, position: dict[str, Any] | None = None) -> "StreamCursor":
        if not isinstance(position, dict | None):
            raise elsewhere(position, "a stream's state")
        self.latest = StreamCursor(self, self.start if position is None else position)
        return self.latest


class StreamCursor:
    number: int | None = None

    def __init__(self, source: StreamSource, position: dict[str, Any]) -> None:
        self.source = source
        self.opened_at = position
        self.started = False
        source.dataset.load_state_dict(position)
        self.rows = iter(source.dataset)

    def read(self) -> Any:
        waits = iter(self.source.retry_waits)
        while True:
            try:
                for row in self.rows:
                    self.started = True
                    return row
                raise EOFError
            except EOFError:
                raise
            # What fails may be a connection or a server, each with errors of its own.
            except Exception as error:
                if isinstance(error, NO_NETWORK_ERRORS) and not isinstance(error, OSError):
                    raise DatasetError(
                        f"The streamed dataset cannot be read ({type(error).__name__}: {error}). Its files, or the "
                        "code that reads them, are not what they were taken for; reading again would give the same."
                    ) from error
                self._try_again(error, next(waits, None))

    def _try_again(self, error: Exception, wait: float | None) -> None:
        """Open the stream once more after its latest row; an iterator that has failed gives nothing any more."""
        words = f"Reading the streamed dataset failed ({type(error).__name__}: {error})"
        if wait is None:
            raise DatasetError(
                f"{words}, and so did {len(self.source.retry_waits)} further attempts. Check the network and the "
                "dataset, then resume."
            ) from error
        logger.warning("%s. Trying the same row again in %g s.", words, wait)
        time.sleep(wait)
        position = self.position()
        self.source.dataset.load_state_dict(position)
        self.rows, self.opened_at, self.started = iter(self.source.dataset), position, False

    def skip(self, count: int) -> None:
        for _ in range(count):
            try:
                self.read()
            except EOFError:
                return

    def position(self) -> dict[str, Any]:
        if self.source.latest is not self:
            raise RuntimeError(
                "a second pass over this streamed dataset has begun, so the first can no longer tell its position; "
                "load the dataset once for each pass that runs at the same time"
            )
        return self.source.dataset.state_dict() if self.started else self.opened_at


def elsewhere(position: Any, expected: str) -> DatasetError:
    return DatasetError(
        f"the place {str(position)[:80]} is not one of this data, which goes on from {expected}; give the data that "
        "was read before"
    )


@dataclass(frozen=True)
class _Layout:
    """How documents lie in a file: what cuts it into undecoded rows, each with the offset after it, what decodes one,
    and what ends each (None where offsets are no bytes, because all is in memory).
    """

    pieces: Callable[[BinaryIO, int], Iterator[tuple[Any, int]]]
    parse: Callable[[Path, Any, int], Any]
    end: bytes | None

    @property
    def in_memory(self) -> bool:
        return self.end is None


def _layout(path: Path, separator: str | None) -> _Layout:
    with path.open("rb") as handle:
        beginning = handle.read(CHUNK_BYTES)
    if path.suffix == ".txt":
        if separator is None and END_OF_TEXT.encode() in beginning:
            separator = END_OF_TEXT
        if separator is None:
            return _Layout(_paragraphs, _parse_text, b"\n")
        return _Layout(partial(_separated, separator.encode()), _parse_text, separator.encode())
    if path.suffix == ".json" and beginning.lstrip()[:1] == b"[":
        return _Layout(partial(_array_items, path), _parse_object, None)
    return _Layout(_lines, _parse_line, b"\n")


def _open_pieces(
    path: Path, offset: int, separator: str | None
) -> tuple[Iterator[tuple[Any, int]], Callable[[Path, Any, int], Any]]:
    """Undecoded rows of one file with the offset after each, and the function that decodes one."""
    layout = _layout(path, separator)
    handle = path.open("rb")
    if layout.end is not None:
        _go_to(path, handle, offset, layout.end)
    return layout.pieces(handle, offset), layout.parse


def _go_to(path: Path, handle: BinaryIO, offset: int, end: bytes) -> None:
    """Go to where a document begins: at the start of a file, its end, or after what ends documents."""
    size = handle.seek(0, io.SEEK_END)
    begin = max(0, offset - len(end))
    handle.seek(begin)
    if offset not in (0, size) and (offset > size or handle.read(offset - begin) != end):
        handle.close()
        raise DatasetError(
            f"byte {offset:,} of {path} ({size:,} bytes) is not where a document begins, so this is not the file that "
            "was read before. Give that one, or start anew."
        )
    handle.seek(offset)


def _separated(separator: bytes, handle: BinaryIO, offset: int) -> Iterator[tuple[bytes, int]]:
    with handle:
        rest = b""
        while chunk := handle.read(CHUNK_BYTES):
            *pieces, rest = (rest + chunk).split(separator)
            for piece in pieces:
                offset += len(piece) + len(separator)
                if piece.strip():
                    yield piece, offset
        if rest.strip():
            yield rest, offset + len(rest)


def _paragraphs(handle: BinaryIO, offset: int) -> Iterator[tuple[bytes, int]]:
    with handle:
        lines: list[bytes] = []
        for line in handle:
            offset += len(line)
            if line.strip():
                lines.append(line)
            elif lines:
                yield b"".join(lines), offset
                lines = []
        if lines:
            yield b"".join(lines), offset


def _lines(handle: BinaryIO, offset: int) -> Iterator[tuple[bytes, int]]:
    with handle:
        for line in handle:
            offset += len(line)
            if line.strip():
                yield line, offset


def _array_items(path: Path, handle: BinaryIO, offset: int) -> Iterator[tuple[Any, int]]:
    """Items of a .json file that is one array; such a file has to be held whole, and its offset counts items."""
    with handle:
        handle.seek(0)
        try:
            items = json.load(handle)
        except ValueError as error:
            raise DatasetError(f"{path} begins like a JSON array but is not one: {error}") from error
    for index in range(offset, len(items)):
        yield items[index], index + 1


def _parse_text(path: Path, piece: bytes, begin: int) -> dict[str, str]:
    try:
        return {"text": piece.decode("utf-8").lstrip("\ufeff").strip()}
    except UnicodeDecodeError as error:
        raise UnreadableRow(
            f"{path} is not UTF-8 text in the document that begins at byte {begin}: {error}. "
            "Convert the file to UTF-8."
        ) from error


def _parse_line(path: Path, piece: bytes, begin: int) -> dict[str, Any]:
    try:
        row = json.loads(piece)
    except ValueError as error:
        raise UnreadableRow(
            f"{path}, the line at byte {begin} is not JSON: {error}. Expected one object a line, "
            'such as {"text": "..."}.'
        ) from error
    return _parse_object(path, row, begin)


def _parse_object(path: Path, row: Any, begin: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UnreadableRow(
            f'{path} holds a {type(row).__name__} at offset {begin}, expected an object such as {{"text": "..."}}'
        )
    return row
