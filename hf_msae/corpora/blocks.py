"""Whole documents, some at a time, cut to token windows of which every token knows its document and its place there.

Training mixes tokens and forgets where they came from. Whoever reads latents of documents wants to know, and wants the
latents of a document to be the same whatever stands beside it: so by default each document has windows of its own. A
document that is longer than a window goes on in the next one, as in training, behind a BOS of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_msae.data import Document, Documents, Window
from hf_msae.data.documents import Pass
from hf_msae.data.sources import UnreadableRow
from hf_msae.data.states import check_state
from hf_msae.data.windows import DOCUMENTS_PER_BATCH, DocumentEncoder, check_context_length

# Documents are tokenized together up to so many characters, so that a shelf of books is not in memory at once.
CHARACTERS_PER_BATCH = 500_000
CHARACTERS_PER_TOKEN = 4
COUNTS = ("num_tokens", "num_documents", "num_unreadable")


@dataclass(frozen=True)
class PlacedWindow:
    """A window with the place of each token.

    Args:
        window: what the language model reads.
        documents: for each of its tokens, which of the block's documents it is of, (T,) int64. For a BOS that was put
            in front of a cut, any.
        positions: where in its document, (T,) int64; the first token of a document, a BOS too, is at 0.
    """

    window: Window
    documents: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Block:
    """Some documents.

    Args:
        numbers: of the documents, in the order in which they are stored.
        texts: what people read of each.
        windows: of all of them, each document's in order.
    """

    numbers: list[int]
    texts: list[str]
    windows: list[PlacedWindow]


@dataclass(frozen=True)
class _Tokenized:
    number: int
    document: Document
    ids: list[int]
    num_counted: int


class DocumentBlocks:
    """Blocks of whole documents; iterates and goes on as `Documents` does, at the next block.

    Args:
        documents: to read, in their own order.
        tokenizer: of the language model.
        context_length: the most tokens in a window, BOS included.
        packing: whether a window may hold the end of one document and the beginning of the next.
        vocab_size: rows of the model's embedding; documents with other tokens are skipped.
        block_tokens: about how many tokens that count are in a block.
        document_tokens: so many of each document are read, from its beginning; None reads all.
        max_tokens: ends with the document that brings the tokens that count to this number; None reads all documents.
        max_documents: ends with this many documents that have tokens that count; None reads all.

    Attributes:
        num_tokens: that count, in the blocks so far.
        num_documents: in the blocks so far.
        num_unreadable: documents that were skipped, because the model cannot read them.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_length: int,
        packing: bool = False,
        vocab_size: int | None = None,
        block_tokens: int = 2**15,
        document_tokens: int | None = None,
        max_tokens: int | None = None,
        max_documents: int | None = None,
    ) -> None:
        check_context_length(context_length)
        self.documents, self.tokenizer = documents.view(), tokenizer
        self.encoder = DocumentEncoder(tokenizer, vocab_size)
        self.context_length, self.packing, self.block_tokens = context_length, packing, block_tokens
        self.document_tokens, self.max_tokens, self.max_documents = document_tokens, max_tokens, max_documents
        self.num_tokens = self.num_documents = self.num_unreadable = 0

    def state_dict(self) -> dict[str, Any]:
        """The place after the latest block; JSON can hold it."""
        counts = {name: vars(self)[name] for name in COUNTS}
        return {**counts, "documents": self.documents.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next pass go on behind the block after which `state` was taken."""
        check_state(state, *COUNTS)
        self.documents.load_state_dict(check_state(state.get("documents")))
        vars(self).update({name: state[name] for name in COUNTS})

    def __iter__(self) -> Iterator[Block]:
        if self._is_done():
            return
        reader = iter(self.documents)
        while True:
            found = self._read(reader)
            if found:
                yield self._cut(found)
            if not found or self._is_done():
                return

    def _is_done(self) -> bool:
        enough_tokens = self.max_tokens is not None and self.num_tokens >= self.max_tokens
        return enough_tokens or (self.max_documents is not None and self.num_documents >= self.max_documents)

    def _read(self, reader: Pass) -> list[_Tokenized]:
        """The documents of a block; none at the end of the data."""
        found: list[_Tokenized] = []
        begun = self.num_tokens
        while self.num_tokens - begun < self.block_tokens and (batch := self._take(reader)):
            for (number, document), ids in zip(
                batch, self.encoder.encode_each([document for _, document in batch]), strict=True
            ):
                if isinstance(ids, UnreadableRow):
                    self.documents.skip_document(number, ids)
                    self.num_unreadable += 1
                    continue
                ids = ids[: self.document_tokens]
                counted = self.encoder.count(ids)
                if counted:
                    found.append(_Tokenized(number, document, ids, counted))
                    self.num_tokens, self.num_documents = self.num_tokens + counted, self.num_documents + 1
                    if self._is_done():
                        return found
        return found

    def _take(self, reader: Pass) -> list[tuple[int, Document]]:
        """The next documents to tokenize together: not many more than a block needs."""
        found: list[tuple[int, Document]] = []
        size, enough = 0, min(CHARACTERS_PER_BATCH, CHARACTERS_PER_TOKEN * self.block_tokens)
        while len(found) < DOCUMENTS_PER_BATCH and size < enough:
            document = next(reader, None)
            if document is None:
                break
            found.append((reader.number, document))
            size += _num_characters(document)
        return found

    def _cut(self, found: Sequence[_Tokenized]) -> Block:
        ids = [torch.tensor(one.ids) for one in found]
        owners = [torch.full((len(part),), index) for index, part in enumerate(ids)]
        positions = [torch.arange(len(part)) for part in ids]
        if self.packing:
            ids, owners, positions = ([torch.cat(parts)] for parts in (ids, owners, positions))
        windows: list[PlacedWindow] = []
        for part, of, at in zip(ids, owners, positions, strict=True):
            windows += self._windows(part.tolist(), of, at)
        texts = [one.document if isinstance(one.document, str) else self._text(one.ids) for one in found]
        return Block([one.number for one in found], texts, windows)

    def _windows(self, ids: list[int], owners: Tensor, positions: Tensor) -> list[PlacedWindow]:
        windows, rest = self.encoder.pack(ids, self.context_length, last=True)
        assert not rest
        found, end = [], 0
        for window in windows:
            # A BOS may have been put in front, or some of several taken away; behind it all is as it was.
            size = len(window.input_ids)
            adds = self.encoder.start_id is not None and ids[end] != self.encoder.start_id
            taken = min(self.context_length - adds, len(ids) - end)
            places = torch.arange(end + taken - size, end + taken).clamp_min(0)
            end += taken
            found.append(PlacedWindow(window, owners[places], positions[places]))
        return found

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _num_characters(document: Document) -> int:
    if isinstance(document, str):
        return len(document)
    # Of token ids as many as they usually stand for, of chats the messages'.
    return sum(CHARACTERS_PER_TOKEN if isinstance(part, int) else len(str(part.get("content"))) for part in document)
