"""Text and JSON files as rows, read with their byte offsets.

That needs no dependency, and a run that was killed jumps straight to the offset at which its next row begins.
"""

import io
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from hf_msae.data.sources import DatasetError, UnreadableRow, unknown_position

END_OF_TEXT = "<|endoftext|>"
CHUNK_BYTES = 1 << 20


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
        """As `Source.open`."""
        position = [0, 0] if position is None else position
        if not isinstance(position, list | tuple) or [type(number) for number in position] != [int, int]:
            raise unknown_position(position, "a file's number and a byte in it")
        file_number, offset = position
        if offset < 0 or not 0 <= file_number < len(self.paths):
            raise unknown_position(position, f"a place in one of {len(self.paths)} files")
        return FileCursor(self, file_number, offset)


class FileCursor:
    """One pass over files."""

    number: int | None = None

    def __init__(self, source: FileSource, file_number: int, offset: int) -> None:
        self.source = source
        self.file_number = file_number
        self.offset = offset
        self.pieces: Iterator[tuple[Any, int]] | None = None
        self.parse: Callable[[Path, Any, int], Any] = _parse_text

    def read(self) -> Any:
        """As `Cursor.read`."""
        begin, piece = self._next_piece()
        return self.parse(self.source.paths[self.file_number], piece, begin)

    def skip(self, count: int) -> None:
        """As `Cursor.skip`."""
        for _ in range(count):
            try:
                self._next_piece()
            except EOFError:
                return

    def position(self) -> list[int]:
        """As `Cursor.position`."""
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


@dataclass(frozen=True)
class _Layout:
    """How documents lie in a file.

    Args:
        pieces: Cuts it into undecoded rows, each with the offset after it.
        parse: Decodes one.
        end: What ends each; None where offsets are no bytes, because all is in memory.
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
