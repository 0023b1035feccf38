"""Held-out text: whole documents that the hash of their contents chose (see `hash_split`), from all parts of the data.

The documents are gone through in one order, the same for every run, until those with lots in the base share have
enough tokens; so a stream is read no further than needed, and what more text a later evaluation asks for comes from
documents that training passed over. Small data ends before: then the share is what has enough tokens, no more.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from hf_msae.data.documents import Documents
from hf_msae.data.hash_split import Split, lot
from hf_msae.data.loading import as_documents
from hf_msae.data.sources import DatasetError, UnreadableRow
from hf_msae.data.windows import DocumentEncoder, Window, check_context_length
from hf_msae.errors import InputError

logger = logging.getLogger(__name__)

# Of all documents, for measuring and again for calibration. 100,000 tokens are found within 5 million, some 20 MB.
BASE_SHARE = 0.02
BASE_SPLIT = Split(BASE_SHARE, BASE_SHARE)
ORDER_SEED = 0
# No more is taken of a document, so that one book does not stand for everything.
MOST_TOKENS = 8192
# Documents with fewer tokens on average are most likely lines or words of what was meant to be one.
FEW_TOKENS = 5

SEPARATOR_HINT = (
    "A .txt file is cut at blank lines where no separator is given; '\\n' makes each line a document, and a separator "
    "that does not occur the whole file."
)

Purpose = Literal["measuring", "calibration"]


@dataclass(frozen=True)
class HeldOutWindows:
    """Windows of held-out documents, and how they were found.

    share: documents of this purpose with lots up to here are held out. num_documents: those that were taken; num_read:
    those that were gone through; num_tokens: those that count.
    """

    windows: list[Window]
    share: float
    num_documents: int
    num_read: int
    num_tokens: int

    def facts(self) -> dict[str, Any]:
        """What metrics.json says of it."""
        counts = {"documents": self.num_documents, "documents_read": self.num_read, "tokens": self.num_tokens}
        return {"share": self.share, **counts}


def hold_out(
    documents: Any,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    num_tokens: int,
    pack: bool = True,
    *,
    purpose: Purpose = "measuring",
    vocab_size: int | None = None,
) -> HeldOutWindows:
    """Documents for measuring or for calibration; train on `documents.without(split)`, see `split_of`.

    Args:
        documents: `Documents` before sharding (every process holds out the same), or what `as_documents` takes.
        num_tokens: the least number of tokens that count; whole documents are taken until it is reached, or, of those
            longer than 8,192 tokens and `context_length`, that many from a place in them.
        tokenizer: as in `TokenWindows`.
        context_length: as there.
        pack: as there.
        purpose: "measuring" or "calibration"; the two never share documents, see `split_of`.
        vocab_size: as in `TokenWindows`.

    Returns:
        Their windows, and how they were found.

    Raises:
        ValueError: the documents are a shard, or something was held out of them already.
        DatasetError: all documents together have fewer tokens.
    """
    check_context_length(context_length)
    documents = as_documents(documents)
    if documents.world_size > 1 or documents.split:
        raise InputError("hold out documents before sharding them, so that every process holds out the same ones")
    return _Search(documents, DocumentEncoder(tokenizer, vocab_size), context_length, num_tokens, pack, purpose).run()


def split_of(measuring: HeldOutWindows, calibration: HeldOutWindows, documents: Documents) -> Split:
    """What training must leave out. Raises `DatasetError` where the two would share documents."""
    if measuring.share + calibration.share > 1:
        raise DatasetError(
            f"cannot hold out {measuring.num_tokens:,} tokens to measure on and {calibration.num_tokens:,} for "
            f"calibration: {documents.description} has too few documents for both. Hold out fewer (eval_tokens, "
            "calibration_tokens), or use more data."
        )
    return Split(measuring.share, calibration.share)


@dataclass
class _Search:
    documents: Documents
    encoder: DocumentEncoder
    context_length: int
    num_tokens: int
    pack: bool
    purpose: Purpose

    def run(self) -> HeldOutWindows:
        share, stop = BASE_SHARE, True
        while True:
            found, read = self._gather(share, stop)
            tokens = sum(self.encoder.count(ids) for _, ids in found)
            if tokens >= self.num_tokens:
                return self._result(found, share, read) if stop else self._lowest(found, read)
            if share == 1:
                raise self._too_few(tokens, read)
            # The data has ended: all of it is known to be small. First the base share again, for the order of lots.
            share, stop = min(1.0, 2 * share), False

    def _gather(self, share: float, stop: bool) -> tuple[list[tuple[float, list[int]]], int]:
        """(distance, token ids) of the documents within a share, and how many were read.

        They are read until they are enough, or all.
        """
        found: list[tuple[float, list[int]]] = []
        tokens = read = 0
        for distance, ids in self._encoded(share):
            read += 1
            if not ids:
                continue
            found.append((distance, ids))
            tokens += self.encoder.count(ids)
            if stop and tokens >= self.num_tokens:
                break
        return found, read

    def _encoded(self, share: float) -> Iterator[tuple[float, list[int]]]:
        """Every document's distance from the end of the lots that this purpose takes; token ids within the share."""
        view = self.documents.shuffle(ORDER_SEED)
        reader = iter(view)
        for document in reader:
            number = lot(document)
            distance = number if self.purpose == "measuring" else 1 - number
            if not self._holds(share, number):
                yield distance, []
                continue
            ids = self.encoder.encode_each([document])[0]
            if isinstance(ids, UnreadableRow):
                view.skip_document(reader.number, ids)
                ids = []
            yield distance, self._piece(ids, number)

    def _holds(self, share: float, number: float) -> bool:
        split = Split(measuring=share) if self.purpose == "measuring" else Split(calibration=share)
        return split.holds(number)

    def _piece(self, ids: list[int], number: float) -> list[int]:
        """Of a long document a part, from a place that its lot chooses: beginnings are unlike the rest."""
        most = max(MOST_TOKENS, self.context_length) if self.pack else self.context_length
        if len(ids) <= most:
            return ids
        begin = int(number * 2**32 % 1 * (len(ids) - most + 1)) if self.pack else 0
        return self.encoder.start(ids[begin : begin + most])

    def _lowest(self, found: list[tuple[float, list[int]]], read: int) -> HeldOutWindows:
        """The nearest documents that have enough tokens, and the share that they are."""
        taken: list[tuple[float, list[int]]] = []
        tokens = 0
        for item in sorted(found, key=lambda item: item[0]):
            if tokens >= self.num_tokens:
                break
            taken.append(item)
            tokens += self.encoder.count(item[1])
        return self._result(taken, math.nextafter(taken[-1][0], 2), read)

    def _result(self, found: list[tuple[float, list[int]]], share: float, read: int) -> HeldOutWindows:
        pieces = [ids for _, ids in found]
        if self.pack:
            windows, _ = self.encoder.pack([token for ids in pieces for token in ids], self.context_length, last=True)
        else:
            windows = [self.encoder.window(ids) for ids in pieces]
        tokens = sum(int(window.keep.sum()) for window in windows)
        if tokens < FEW_TOKENS * len(found):
            logger.warning(
                "The documents of %s have %.1f tokens on average, which is little context for a language model. Is "
                "that meant? (%s)",
                self.documents.description,
                tokens / len(found),
                SEPARATOR_HINT,
            )
        return HeldOutWindows(windows, share, len(found), read, tokens)

    def _too_few(self, tokens: int, read: int) -> DatasetError:
        long = f" (of a document at most {MOST_TOKENS:,} are taken)" if self.pack else ""
        return DatasetError(
            f"cannot hold out {self.num_tokens:,} tokens: all {read:,} documents of {self.documents.description} have "
            f"{tokens:,}{long}. Hold out fewer, or use more data. ({SEPARATOR_HINT})"
        )
