"""Held-out text: whole documents that the hash of their contents chose (see `hash_split`), from all parts of the data.

The documents are gone through in one order, the same for every run, until those whose hash values are in the base
share have enough tokens; so a stream is read no further than needed, and what more text a later evaluation asks for
comes from documents that training passed over. Small data ends before: then the share is what has enough tokens, no
more.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from hf_msae.data.documents import DocumentsLike
from hf_msae.data.hash_split import Split, hash_value
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


@dataclass(frozen=True)
class HeldOutWindows:
    """Windows of held-out documents, and how they were found.

    share: documents of this purpose with hash values up to here are held out. num_documents: those that were taken;
    num_read: those that were gone through; num_tokens: those that count.
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


@dataclass(frozen=True)
class TrainingHoldOut:
    """What a training run holds out of its documents.

    Attributes:
        measuring: To measure on.
        calibration: To set thresholds by; shares no document with `measuring`.
        split: What training must leave out: train on `documents.without(split)`.
    """

    measuring: HeldOutWindows
    calibration: HeldOutWindows
    split: Split


def hold_out(
    documents: DocumentsLike,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    num_tokens: int,
    pack: bool = True,
    *,
    vocab_size: int | None = None,
) -> HeldOutWindows:
    """Documents for measuring, the same that a training run on these documents measures on.

    Args:
        documents: `Documents` before sharding (every process holds out the same), or what `as_documents` takes.
        num_tokens: the least number of tokens that count; whole documents are taken until it is reached, or, of those
            longer than 8,192 tokens and `context_length`, that many from a place in them.
        tokenizer: as in `TokenWindows`.
        context_length: as there.
        pack: as there.
        vocab_size: as in `TokenWindows`.

    Returns:
        Their windows, and how they were found.

    Raises:
        ValueError: the documents are a shard, or something was held out of them already.
        DatasetError: all documents together have fewer tokens.
    """
    reader = _Reader(documents, tokenizer, context_length, pack, vocab_size)
    (measuring,) = reader.find([_Purpose("measuring", num_tokens)])
    return measuring


def hold_out_for_training(
    documents: DocumentsLike,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    eval_tokens: int,
    calibration_tokens: int,
    pack: bool = True,
    *,
    vocab_size: int | None = None,
) -> TrainingHoldOut:
    """Documents for measuring and others for calibration, found in one pass.

    Args:
        documents: as in `hold_out`.
        tokenizer: as there.
        context_length: as there.
        eval_tokens: the least number of tokens for measuring.
        calibration_tokens: the least number of tokens for calibration.
        pack: as there.
        vocab_size: as there.

    Returns:
        Both, and what training must leave out.

    Raises:
        ValueError: as there.
        DatasetError: there are too few documents for one of them, or for both.
    """
    reader = _Reader(documents, tokenizer, context_length, pack, vocab_size)
    purposes = [_Purpose("measuring", eval_tokens), _Purpose("calibration", calibration_tokens)]
    measuring, calibration = reader.find(purposes)
    if measuring.share + calibration.share > 1:
        raise DatasetError(
            f"cannot hold out {measuring.num_tokens:,} tokens to measure on and {calibration.num_tokens:,} for "
            f"calibration: {reader.documents.description} has too few documents for both. Hold out fewer "
            "(eval_tokens, calibration_tokens), or use more data."
        )
    return TrainingHoldOut(measuring, calibration, Split(measuring.share, calibration.share))


@dataclass
class _Purpose:
    """What documents are held out for, and those found so far."""

    kind: Literal["measuring", "calibration"]
    num_tokens: int
    found: list[tuple[float, list[int]]] = field(default_factory=list)  # (distance, token ids)
    tokens: int = 0
    num_read: int = 0

    @property
    def enough(self) -> bool:
        return self.tokens >= self.num_tokens

    def distance(self, value: float) -> float:
        """From the end of the hash values that this purpose takes."""
        return value if self.kind == "measuring" else 1 - value

    def holds(self, value: float, share: float) -> bool:
        return Split(**{self.kind: share}).holds(value)


class _Reader:
    """Goes through documents for those that purposes take."""

    def __init__(
        self,
        documents: DocumentsLike,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int,
        pack: bool,
        vocab_size: int | None,
    ) -> None:
        check_context_length(context_length)
        self.documents = as_documents(documents)
        if self.documents.world_size > 1 or self.documents.split:
            raise InputError("hold out documents before sharding them, so that every process holds out the same ones")
        self.encoder = DocumentEncoder(tokenizer, vocab_size)
        self.context_length, self.pack = context_length, pack

    def find(self, purposes: Sequence[_Purpose]) -> list[HeldOutWindows]:
        """The windows of each purpose, read together as far as one of them needs more."""
        self._gather(purposes, BASE_SHARE, stop=True)
        return [
            self._result(purpose, purpose.found, BASE_SHARE) if purpose.enough else self._of_small_data(purpose)
            for purpose in purposes
        ]

    def _of_small_data(self, purpose: _Purpose) -> HeldOutWindows:
        """All of the data is known, and small. First the base share again, for the order of hash values."""
        share = BASE_SHARE
        while not purpose.enough:
            if share == 1:
                raise self._too_few(purpose)
            share = min(1.0, 2 * share)
            self._gather([purpose], share, stop=False)
        return self._lowest(purpose)

    def _gather(self, purposes: Sequence[_Purpose], share: float, *, stop: bool) -> None:
        """Read documents until each purpose has enough, or all; keep those within a share."""
        for purpose in purposes:
            purpose.found, purpose.tokens, purpose.num_read = [], 0, 0
        view = self.documents.shuffle(ORDER_SEED)
        reader = iter(view)
        open_purposes = list(purposes)
        for document in reader:
            number = hash_value(document)
            for purpose in open_purposes:
                purpose.num_read += 1
                if not purpose.holds(number, share):
                    continue
                ids = self.encoder.encode_each([document])[0]
                if isinstance(ids, UnreadableRow):
                    view.skip_document(reader.number, ids)
                elif piece := self._piece(ids, number):
                    purpose.found.append((purpose.distance(number), piece))
                    purpose.tokens += self.encoder.count(piece)
            if stop:
                open_purposes = [purpose for purpose in open_purposes if not purpose.enough]
                if not open_purposes:
                    return

    def _piece(self, ids: list[int], number: float) -> list[int]:
        """Of a long document a part, from a place that its hash value chooses: beginnings are unlike the rest."""
        most = max(MOST_TOKENS, self.context_length) if self.pack else self.context_length
        if len(ids) <= most:
            return ids
        begin = int(number * 2**32 % 1 * (len(ids) - most + 1)) if self.pack else 0
        return self.encoder.start(ids[begin : begin + most])

    def _lowest(self, purpose: _Purpose) -> HeldOutWindows:
        """The nearest documents that have enough tokens, and the share that they are."""
        taken: list[tuple[float, list[int]]] = []
        tokens = 0
        for item in sorted(purpose.found, key=lambda item: item[0]):
            if tokens >= purpose.num_tokens:
                break
            taken.append(item)
            tokens += self.encoder.count(item[1])
        return self._result(purpose, taken, math.nextafter(taken[-1][0], 2))

    def _result(self, purpose: _Purpose, found: list[tuple[float, list[int]]], share: float) -> HeldOutWindows:
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
        return HeldOutWindows(windows, share, len(found), purpose.num_read, tokens)

    def _too_few(self, purpose: _Purpose) -> DatasetError:
        long = f" (of a document at most {MOST_TOKENS:,} are taken)" if self.pack else ""
        return DatasetError(
            f"cannot hold out {purpose.num_tokens:,} tokens: all {purpose.num_read:,} documents of "
            f"{self.documents.description} have {purpose.tokens:,}{long}. Hold out fewer, or use more data. "
            f"({SEPARATOR_HINT})"
        )
