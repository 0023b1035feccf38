"""Sources in an order that a seed fixes, and places in that order.

What has a length is read in any order. Files of text get one: they are gone through once for where each document
begins (8 bytes each, kept). A stream can only be read on: its rows are taken in blocks, each in an order of its own,
and a pass that goes on reads its block again. So the state stays small, whatever a row weighs, and nothing that was
read ahead is lost, as it is where `datasets` shuffles with a buffer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_msae.data.randomness import seeded_generator
from hf_msae.data.sources import Cursor, DatasetError, SequenceSource, Source, UnreadableRow, unknown_position
from hf_msae.data.states import check_state
from hf_msae.data.text_files import FileSource

# A block of a stream ends after so many rows, or so many bytes, whichever comes first.
BLOCK_ROWS, BLOCK_BYTES = 10_000, 1 << 26


def shuffled(source: Source, seed: int) -> Source:
    """The rows of a source in the order of a seed."""
    if isinstance(source, SequenceSource):
        return PermutedSource(source, seed)
    if isinstance(source, FileSource):
        return PermutedSource(SequenceSource(source.indexed()), seed)
    return BlockSource(source, seed)


class PermutedSource:
    """All rows of a sequence, in any order; a position is a place in the order."""

    def __init__(self, source: SequenceSource, seed: int) -> None:
        self.source = source
        self.num_documents = source.num_documents
        self.order = torch.randperm(len(source.rows), generator=seeded_generator(seed, 0))

    def open(self, position: int | None = None) -> "PermutedCursor":
        """As `Source.open`."""
        if position is not None and (type(position) is not int or position < 0):
            raise unknown_position(position, "a place in the order of its rows")
        return PermutedCursor(self, position or 0)


class PermutedCursor:
    """One pass over a sequence in a shuffled order."""

    def __init__(self, source: PermutedSource, index: int) -> None:
        self.source, self.index = source, index
        self.number: int | None = None

    def read(self) -> Any:
        """As `Cursor.read`."""
        if self.index >= len(self.source.order):
            raise EOFError
        self.number = int(self.source.order[self.index])
        self.index += 1
        return self.source.source.open(self.number).read()

    def skip(self, count: int) -> None:
        """As `Cursor.skip`."""
        self.index += count

    def position(self) -> int:
        """As `Cursor.position`."""
        return self.index


class BlockSource:
    """Rows of a stream, those of each block in an order of their own.

    A position is where the block begins, which block it is, its first row's number, and how many of its rows were
    passed.
    """

    def __init__(self, source: Source, seed: int) -> None:
        self.source, self.seed = source, seed
        self.num_documents = source.num_documents

    def open(self, position: Mapping[str, Any] | None = None) -> "BlockCursor":
        """As `Source.open`."""
        position = {"begin": None, "block": 0, "first": 0, "given": 0} if position is None else position
        counts = ("block", "first", "given")
        if not isinstance(position, dict) or position.keys() != {"begin", *counts}:
            raise unknown_position(position, "a block of a stream that is shuffled")
        check_state(position, *counts)
        return BlockCursor(self, position)


@dataclass
class _Block:
    rows: list[Any]
    order: Sequence[int]
    ends: Any


class BlockCursor:
    """One pass over a stream whose rows are shuffled block by block."""

    def __init__(self, source: BlockSource, position: Mapping[str, Any]) -> None:
        self.source = source
        self.begin, self.given = position["begin"], position["given"]
        self.block_number, self.first = position["block"], position["first"]
        self.number: int | None = None
        self.rows: Cursor | None = source.source.open(self.begin)
        self.block: _Block | None = None

    def read(self) -> Any:
        """As `Cursor.read`."""
        block = self._current()
        place = block.order[self.given]
        self.given += 1
        self.number = self.first + place
        row, block.rows[place] = block.rows[place], None
        if isinstance(row, UnreadableRow):
            raise row
        return row

    def skip(self, count: int) -> None:
        """As `Cursor.skip`."""
        while count:
            try:
                block = self._current()
            except EOFError:
                return
            passed = min(count, len(block.rows) - self.given)
            self.given += passed
            count -= passed

    def position(self) -> dict[str, Any]:
        """As `Cursor.position`."""
        if self.block is not None and self.given == len(self.block.rows):
            begin, block, first, given = self.block.ends, self.block_number + 1, self.first + self.given, 0
        else:
            begin, block, first, given = self.begin, self.block_number, self.first, self.given
        return {"begin": begin, "block": block, "first": first, "given": given}

    def _current(self) -> _Block:
        """The block in which the next row is. Raises `EOFError` after the last."""
        if self.block is not None and self.given < len(self.block.rows):
            return self.block
        place = self.position()
        block = self._read_block(place["begin"], place["block"])
        self.begin, self.block_number, self.first, self.given = place.values()
        if self.given >= len(block.rows) and block.rows:
            raise DatasetError("the data ends before the place at which a pass over it is to go on; is it the same?")
        self.block = block
        if not block.rows:
            raise EOFError
        return block

    def _read_block(self, begin: Any, number: int) -> _Block:
        reader, self.rows = self.rows or self.source.source.open(begin), None  # opened anew should reading fail
        rows: list[Any] = []
        size = 0
        while len(rows) < BLOCK_ROWS and size < BLOCK_BYTES:
            try:
                rows.append(reader.read())
            except EOFError:
                break
            except UnreadableRow as error:
                rows.append(error)
            size += _bytes(rows[-1])
        order = torch.randperm(len(rows), generator=seeded_generator(self.source.seed, 1, number)).tolist()
        self.rows = reader
        return _Block(rows, order, reader.position())


def _bytes(row: Any) -> int:
    """About what a row takes; only its order of magnitude matters."""
    if isinstance(row, str | bytes):
        return len(row)
    if isinstance(row, Mapping):
        return sum(_bytes(value) for value in row.values())
    if isinstance(row, list | tuple):
        return sum(_bytes(value) for value in row)
    return 8
