"""Token windows: documents cut to the length that a language model reads at once, and which tokens count.

Packing: documents are laid end to end and cut every `context_length` tokens, so that no place in a batch is padding.
    Each
document begins with BOS where the tokenizer has one, and so does each window: models treat the first position as a
sink with a huge activation, and a window that starts in mid-document would put that outlier on an ordinary word. That
BOS is added in front of the cut, so packing neither loses nor repeats a token. `keep` marks the tokens that count:
special tokens (BOS, EOS, padding, chat marks) never reach an SAE or a metric.

Documents are tokenized in batches, which is several times faster than one by one. The state holds where the current
batch began and how many of its windows were given, so it stays small and a resumed pass gives exactly the same
windows.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_msae.data.documents import Document, as_documents
from hf_msae.data.sources import DatasetError

DOCUMENTS_PER_BATCH = 256


@dataclass(frozen=True, eq=False)
class Window:
    """Consecutive tokens: `input_ids` int64 (T,) and `keep` bool (T,), False on every special token."""

    input_ids: Tensor
    keep: Tensor


class TokenWindows:
    """Windows over documents; iterates, resumes and restarts as `Documents` does.

    Args:
        documents: `Documents`, or what `as_documents` takes.
        tokenizer: the language model's tokenizer.
        context_length: the most tokens in a window, BOS included.
        pack: cut the stream of all documents to windows of `context_length` (the last one may be shorter); otherwise
            each document is a window of its own, cut off at `context_length`.

    Attributes:
        num_documents: documents read in the latest pass, in whole batches.
        num_windows: windows given in the latest pass.
        num_truncated: tokens cut off from long documents in the latest pass (0 when packing).

    Raises:
        ValueError: `context_length` is below 2.
        DatasetError: (when a pass ends) no document gave a token that counts; or a chat came to a tokenizer without a
            chat template.
    """

    def __init__(
        self, documents: Any, tokenizer: PreTrainedTokenizerBase, *, context_length: int, pack: bool = True
    ) -> None:
        _check_context_length(context_length)
        self.documents = as_documents(documents).view()
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.pack = pack
        self.encoder = DocumentEncoder(tokenizer)
        self._resume: dict[str, Any] | None = None
        # What was true when the current batch of documents began, and what has happened in it since.
        self._batch: dict[str, Any] = self._first_batch()
        self._batch_documents = self._batch_truncated = self._given = 0

    @property
    def num_documents(self) -> int:
        return self._batch["num_documents"] + self._batch_documents

    @property
    def num_windows(self) -> int:
        return self._batch["num_windows"] + self._given

    @property
    def num_truncated(self) -> int:
        return self._batch["num_truncated"] + self._batch_truncated

    def __iter__(self) -> Iterator[Window]:
        resume, self._resume = self._resume, None
        if resume is not None:
            self.documents.load_state_dict(resume["batch"]["documents"])
        reader = iter(self.documents)
        self._batch = self._first_batch() if resume is None else resume["batch"]
        self._given = 0 if resume is None else resume["given"]
        self._batch_documents = self._batch_truncated = 0
        return self._windows(reader, self._given)

    def state_dict(self) -> dict[str, Any]:
        """The place of the latest pass, with fewer than `context_length` token ids; JSON can hold it."""
        if self._resume is not None:
            return copy.deepcopy(self._resume)
        return {"batch": copy.deepcopy(self._batch), "given": self._given, **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the next pass go on after the window that was given last when `state` was taken.

        Raises `ValueError` where the state is of windows of another length or kind.
        """
        theirs = {key: state[key] for key in self._settings()}
        if theirs != self._settings():
            raise ValueError(f"the state was taken of windows with {theirs}, these have {self._settings()}")
        self._resume = copy.deepcopy(dict(state))

    def _settings(self) -> dict[str, Any]:
        return {"context_length": self.context_length, "pack": self.pack}

    def _first_batch(self) -> dict[str, Any]:
        counts = {"num_documents": 0, "num_windows": 0, "num_truncated": 0}
        return {"documents": self.documents.state_dict(), "carry": [], **counts}

    def _windows(self, reader: Iterator[Document], given: int) -> Iterator[Window]:
        last = False
        while not last:
            batch = list(islice(reader, DOCUMENTS_PER_BATCH))
            last = len(batch) < DOCUMENTS_PER_BATCH
            windows, carry, truncated = self._cut(batch, self._batch["carry"], last)
            self._batch_documents, self._batch_truncated = len(batch), truncated
            for window in windows[given:]:
                self._given += 1
                yield window
            given = 0
            if not last:
                self._begin_batch(carry)
        if self.num_windows == 0:
            raise DatasetError(
                f"empty dataset: none of the {self.num_documents} documents of {self.documents.description} "
                f"(shard {self.documents.rank} of {self.documents.world_size}) gave a token that is not special"
            )

    def _begin_batch(self, carry: list[int]) -> None:
        self._batch = {
            "documents": self.documents.state_dict(),
            "carry": carry,
            "num_documents": self.num_documents,
            "num_windows": self.num_windows,
            "num_truncated": self.num_truncated,
        }
        self._batch_documents = self._batch_truncated = self._given = 0

    def _cut(self, batch: Sequence[Document], carry: list[int], last: bool) -> tuple[list[Window], list[int], int]:
        """The windows of a batch, the tokens left for the next batch, and the number of tokens cut off."""
        encoded = self.encoder.encode(batch)
        if self.pack:
            flat = carry + [token for ids in encoded for token in ids]
            windows, rest = self.encoder.pack(flat, self.context_length, last)
            return windows, rest, 0
        truncated = sum(max(0, len(ids) - self.context_length) for ids in encoded)
        return [self.encoder.window(ids[: self.context_length]) for ids in encoded], [], truncated


class DocumentEncoder:
    """Turns documents into token ids, and token ids into windows, by one rule for BOS and special tokens.

    The tokenizer adds the special tokens that it adds by itself; where it has a BOS (or a CLS) token and does not put
    it in front, as GPT-2's, it is put there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.start_id = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(special | set(tokenizer.all_special_ids))
        self._special = torch.tensor(sorted(self.special_ids), dtype=torch.int64)

    def encode(self, documents: Sequence[Document]) -> list[list[int]]:
        """Token ids of each document; those without any token that counts are left out."""
        texts = [document for document in documents if isinstance(document, str)]
        chats = [document for document in documents if not isinstance(document, str)]
        of_texts, of_chats = iter(self._encode_texts(texts)), iter(self._encode_chats(chats))
        encoded = [next(of_texts) if isinstance(document, str) else next(of_chats) for document in documents]
        return [self._started(ids) for ids in encoded if not self.special_ids.issuperset(ids)]

    def window(self, ids: list[int]) -> Window:
        input_ids = torch.tensor(ids, dtype=torch.int64)
        return Window(input_ids, ~torch.isin(input_ids, self._special))

    def pack(self, ids: list[int], context_length: int, last: bool) -> tuple[list[Window], list[int]]:
        """Cuts `ids` into windows that begin with BOS; what does not fill one is returned, or cut too if `last`."""
        windows: list[Window] = []
        begin = 0
        while begin < len(ids):
            # One place of the window goes to the BOS that is put in front, if one is.
            adds_start = self.start_id not in (None, ids[begin])
            end = begin + context_length - adds_start
            if end > len(ids) and not last:
                break
            windows.append(self.window(self._started(ids[begin:end])))
            begin = end
        return windows, ids[begin:]

    def count(self, ids: list[int]) -> int:
        """The number of tokens that count."""
        return sum(token not in self.special_ids for token in ids)

    def _started(self, ids: list[int]) -> list[int]:
        if self.start_id is None or ids[0] == self.start_id:
            return ids
        return [self.start_id, *ids]

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: a document longer than the model reads is no mistake here, it is cut afterwards.
        return self.tokenizer(texts, verbose=False, return_attention_mask=False)["input_ids"]

    def _encode_chats(self, chats: list[Any]) -> list[list[int]]:
        if not chats:
            return []
        if self.tokenizer.chat_template is None:
            raise DatasetError(
                f"the documents are chats, but the tokenizer {self.tokenizer.name_or_path!r} has no chat template; "
                "use the tokenizer of a chat model, set tokenizer.chat_template, or choose a column with plain text"
            )
        kwargs = {"verbose": False}
        ids: Any = self.tokenizer.apply_chat_template(chats, tokenize=True, return_dict=False, tokenizer_kwargs=kwargs)
        return ids


def hold_out(
    documents: Any, tokenizer: PreTrainedTokenizerBase, context_length: int, num_tokens: int, pack: bool = True
) -> tuple[list[Window], int]:
    """The first documents, for measuring; train on `documents.skip(num_documents_used)`.

    Args:
        documents: `Documents` before sharding (every process holds out the same), or what `as_documents` takes.
        num_tokens: the least number of tokens that count; whole documents are taken until it is reached.
        tokenizer, context_length, pack: as in `TokenWindows`.

    Returns:
        The windows of the documents taken, and the number of documents taken.

    Raises:
        ValueError: the documents are a shard.
        DatasetError: all documents together have fewer tokens.
    """
    _check_context_length(context_length)
    documents = as_documents(documents)
    if documents.world_size > 1:
        raise ValueError("hold out documents before sharding them, so that every process holds out the same ones")
    encoder = DocumentEncoder(tokenizer)
    taken: list[list[int]] = []
    tokens = used = 0
    reader = iter(documents.view())
    while tokens < num_tokens:
        document = next(reader, None)
        if document is None:
            raise DatasetError(
                f"cannot hold out {num_tokens:,} tokens: all {used:,} documents of {documents.description} have "
                f"{tokens:,}. Hold out fewer, or use more data."
            )
        used += 1
        for ids in encoder.encode([document]):
            taken.append(ids if pack else ids[:context_length])
            tokens += encoder.count(taken[-1])
    if pack:
        return encoder.pack([token for ids in taken for token in ids], context_length, last=True)[0], used
    return [encoder.window(ids) for ids in taken], used


class TokenBatch(TypedDict):
    """What `collate` returns."""

    input_ids: Tensor
    attention_mask: Tensor | None
    keep: Tensor


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill short windows with; it is masked, so that any will do where the tokenizer names none."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def collate(windows: Sequence[Window], pad_id: int) -> TokenBatch:
    """One batch for the language model, padded on the right.

    Returns:
        `input_ids` int64 (batch, T), `keep` bool (batch, T) which is False on padding, and `attention_mask` int64
        (batch, T), None where nothing is padded, because models run faster kernels without one.
    """
    lengths = [len(window.input_ids) for window in windows]
    input_ids = torch.full((len(windows), max(lengths)), pad_id, dtype=torch.int64)
    keep = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (window, length) in enumerate(zip(windows, lengths, strict=True)):
        input_ids[row, :length] = window.input_ids
        keep[row, :length] = window.keep
    if min(lengths) == max(lengths):
        return {"input_ids": input_ids, "attention_mask": None, "keep": keep}
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": input_ids, "attention_mask": mask.long(), "keep": keep}


def count_tokens(documents: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """The exact number of tokens that count, by tokenizing all documents with a progress bar."""
    documents = as_documents(documents)
    encoder = DocumentEncoder(tokenizer)
    total = 0
    with logging.tqdm(total=documents.num_documents, desc="Counting tokens", unit=" documents") as progress:
        for batch in _batches(documents.view()):
            total += sum(encoder.count(ids) for ids in encoder.encode(batch))
            progress.update(len(batch))
    return total


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    reader = iter(documents)
    while batch := list(islice(reader, DOCUMENTS_PER_BATCH)):
        yield batch


def _check_context_length(context_length: int) -> None:
    if context_length < 2:
        raise ValueError(f"context_length must be at least 2 (BOS and one token), got {context_length}")
