"""Where rows lie and how to come back to one.

A `Source` opens a `Cursor`; a cursor reads rows in order, skips them, and tells its position as something that JSON
can hold, so that a run that was killed continues at exactly the next row. Text and JSON files are read in
`text_files`; sequences and streams of `datasets`, which keep a state of their own, here. Rows are numbered from 0 in
the order in which a source gives them, and that order never changes.

A row that cannot be read (bytes that are no text, a line that is no JSON) is an `UnreadableRow`, after which a cursor
goes on with the next one. A stream comes over a network, which fails now and then, so it is opened again at the same
row after a while, a few times; errors of the data itself, or of the code that reads it, are told at once. A position
that cannot be one of this source (it is of another kind, or lies within a line) is refused.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from hf_msae.errors import InputError

logger = logging.getLogger(__name__)

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
        """As `Source.open`."""
        if position is not None and (type(position) is not int or position < 0):
            raise unknown_position(position, "a row's number")
        return SequenceCursor(self.rows, position or 0)


class SequenceCursor:
    """One pass over a sequence."""

    number: int | None = None

    def __init__(self, rows: Sequence[Any], index: int) -> None:
        self.rows = rows
        self.index = index

    def read(self) -> Any:
        """As `Cursor.read`."""
        if self.index >= len(self.rows):
            raise EOFError
        self.index += 1
        try:
            return self.rows[self.index - 1]
        except Exception as error:  # whatever decodes the row, down to a user's own code, may fail in its own way
            raise UnreadableRow(f"row {self.index - 1} raises {type(error).__name__}: {error}") from error

    def skip(self, count: int) -> None:
        """As `Cursor.skip`."""
        self.index += count

    def position(self) -> int:
        """As `Cursor.position`."""
        return self.index


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
        """As `Source.open`."""
        if not isinstance(position, dict | None):
            raise unknown_position(position, "a stream's state")
        self.latest = StreamCursor(self, self.start if position is None else position)
        return self.latest


class StreamCursor:
    """One pass over a stream of `datasets`; what fails on the way is tried again."""

    number: int | None = None

    def __init__(self, source: StreamSource, position: dict[str, Any]) -> None:
        self.source = source
        self.opened_at = position
        self.started = False
        source.dataset.load_state_dict(position)
        self.rows = iter(source.dataset)

    def read(self) -> Any:
        """As `Cursor.read`."""
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
        """As `Cursor.skip`."""
        for _ in range(count):
            try:
                self.read()
            except EOFError:
                return

    def position(self) -> dict[str, Any]:
        """As `Cursor.position`."""
        if self.source.latest is not self:
            raise RuntimeError(
                "a second pass over this streamed dataset has begun, so the first can no longer tell its position; "
                "load the dataset once for each pass that runs at the same time"
            )
        return self.source.dataset.state_dict() if self.started else self.opened_at


def unknown_position(position: Any, expected: str) -> DatasetError:
    """The error for a position that is not one of this data."""
    return DatasetError(
        f"the place {str(position)[:80]} is not one of this data, which goes on from {expected}; give the data that "
        "was read before"
    )
