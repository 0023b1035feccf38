"""Documents: an ordered, sharded, resumable sequence of texts and chats, whatever they are stored in.

Everything that reads text (training, evaluation, the cache) reads `Documents`, so the questions that a data set raises
are answered once: which column holds the text, in which order, which documents are held out, which belong to which
process, where a killed run goes on. Document i of the order belongs to rank i % world_size, so that every rank sees
the same mixture; a document that is held out is passed over by the rank to which it belongs.

A document that cannot be read is skipped, and never silently: its number goes to the log and into `unreadable`, which
a training run reports.
"""

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from hf_msae.data.hash_split import EVERYTHING, Split, hash_value
from hf_msae.data.rows import Document, to_document
from hf_msae.data.shuffling import shuffled
from hf_msae.data.sources import Cursor, DatasetError, Source, UnreadableRow
from hf_msae.data.states import check_state
from hf_msae.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

# What `as_documents` takes: texts, chats or rows with columns, in memory or as `datasets` has them.
DocumentsLike: TypeAlias = "Documents | Dataset | IterableDataset | Sequence[str | Sequence[Any] | Mapping[str, Any]]"
# A pass ends where more than half of so many documents, the latest ones, were skipped: then something else is wrong.
RECENT_DOCUMENTS = 1000


class Documents:
    """Texts (`str`), chats (lists of `{"role", "content"}`) and token ids in a fixed order.

    `iter()` starts a pass at the first document, or, once after `load_state_dict`, at the document after the one that
    was read last when the state was taken. `state_dict` tells the place of the pass that was started last.

    Args:
        source: the rows.
        column: the column of each row that holds the document; None where rows are documents.
        chats: whether text in that column is the JSON of a chat.
        description: what a person would call this data, for error messages and model cards.

    Attributes:
        description: as given.
        num_documents: the number of rows of this view (after `shard`), those held out among them; None where only
            reading would tell.
        unreadable: the numbers, in the order in which they are stored, of documents that were skipped because they
            cannot be read, in all passes over all views of these documents.

    Raises (while reading) `DatasetError` where more than half of the last 1,000 documents cannot be read, or a stream
    does not answer.
    """

    def __init__(self, source: Source, *, column: str | None = None, chats: bool = False, description: str) -> None:
        self.source = source
        self.column = column
        self.chats = chats
        self.description = description
        self.split = EVERYTHING
        self.order: int | None = None
        self.rank = 0
        self.world_size = 1
        self.unreadable: set[int] = set()
        self._pass: Pass | None = None
        self._resume: dict[str, Any] | None = None

    @property
    def num_documents(self) -> int | None:
        """The number of rows of this view, those held out among them; None where only reading would tell."""
        if self.source.num_documents is None:
            return None
        return len(range(self.rank, self.source.num_documents, self.world_size))

    def shuffle(self, seed: int) -> "Documents":
        """A view in an order that the seed fixes.

        What has a length and files are put into any order; of a stream, whose rows come one after another, only the
        rows of each 10,000 or 64 MB.
        """
        return self._view(order=seed)

    def without(self, split: Split) -> "Documents":
        """A view without what a split holds out."""
        return self._view(split=split)

    def shard(self, rank: int, world_size: int) -> "Documents":
        """The view of one of `world_size` ranks: documents i with i % world_size == rank."""
        if not 0 <= rank < world_size:
            raise InputError(f"shard expects 0 <= rank < world_size, got rank {rank} of {world_size}")
        if self.world_size > 1:
            raise InputError(
                f"these documents are already shard {self.rank} of {self.world_size}; shard the whole instead"
            )
        return self._view(rank=rank, world_size=world_size)

    def view(self) -> "Documents":
        """The same documents with a place of their own, so that reading them moves no other reader."""
        return self._view()

    def __iter__(self) -> "Pass":
        state, self._resume = self._resume or self._first(), None
        self._pass = Pass(self, state["next"], state["position"])
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
        check_state(state, "next")
        if "position" not in state:
            raise InputError("the state of the data is damaged: it has no 'position'")
        mine = self._view_state()
        if not mine.keys() <= state.keys():
            raise InputError(
                "the state was taken by an earlier hf_msae, which held out the first documents and kept their order; "
                "go on with that version, or start anew"
            )
        theirs = {key: state[key] for key in mine}
        if mine != theirs:
            raise InputError(
                f"the state was taken of documents with {theirs}, these are {mine}; "
                "resume with the same number of processes, seed and held-out documents"
            )
        self._resume = copy.deepcopy(dict(state))

    def skip_document(self, number: int, error: UnreadableRow) -> None:
        """Note that a document of the latest pass cannot be used; raises `DatasetError` where that is too common."""
        if number not in self.unreadable:
            self.unreadable.add(number)
            logger.warning("Skipped document %d of %s, which cannot be read: %s", number, self.description, error)
        if self._pass is None:
            return
        recent = self._pass.recent
        recent[number] = True
        if len(recent) >= RECENT_DOCUMENTS and sum(recent.values()) * 2 > len(recent):
            raise DatasetError(
                f"{sum(recent.values()):,} of the last {len(recent):,} documents of {self.description} cannot be "
                f"read; of number {number}: {error}"
            ) from error

    def _first(self) -> dict[str, Any]:
        return {"next": 0, "position": None, **self._view_state()}

    def _view_state(self) -> dict[str, Any]:
        shard = {"rank": self.rank, "world_size": self.world_size}
        return {"order": self.order, "held_out": self.split.to_dict(), **shard}

    def _view(self, **changed: Any) -> "Documents":
        view = Documents(self.source, column=self.column, chats=self.chats, description=self.description)
        view.split, view.order = changed.get("split", self.split), changed.get("order", self.order)
        view.rank = changed.get("rank", self.rank)
        view.world_size = changed.get("world_size", self.world_size)
        view.unreadable = self.unreadable
        return view


class Pass(Iterator[Document]):
    """One pass over a view: reads the documents of its rank and skips the others.

    number: of the document given last, in the order in which they are stored. recent: the numbers of the latest
    documents, and whether each was skipped.
    """

    def __init__(self, documents: Documents, next_index: int, position: Any | None) -> None:
        self.documents = documents
        source = documents.source if documents.order is None else shuffled(documents.source, documents.order)
        self.cursor: Cursor = source.open(position)
        self.next_index = next_index
        self.number = -1
        self.recent: OrderedDict[int, bool] = OrderedDict()
        if position is None:
            self.cursor.skip(next_index)

    def __next__(self) -> Document:
        while True:
            gap = (self.documents.rank - self.next_index) % self.documents.world_size
            self.cursor.skip(gap)
            self.next_index += gap
            try:
                document = self._read()
            except EOFError:
                raise StopIteration from None
            except UnreadableRow as error:
                self.documents.skip_document(self.number, error)
                continue
            if not self.documents.split or not self.documents.split.holds(hash_value(document)):
                return document

    def _read(self) -> Document:
        # Counted once the row is read or passed over: a read that fails otherwise may be tried again.
        try:
            row = self.cursor.read()
        except UnreadableRow:
            self._count()
            raise
        self._count()
        where = f"document {self.number} of {self.documents.description}"
        return to_document(row, self.documents.column, where, self.documents.chats)

    def _count(self) -> None:
        self.number = self.next_index if self.cursor.number is None else self.cursor.number
        self.next_index += 1
        self.recent[self.number] = False
        if len(self.recent) > RECENT_DOCUMENTS:
            self.recent.popitem(last=False)
