"""Token windows: documents cut to the length that a language model reads at once, and which tokens count.

Packing: documents are laid end to end and cut every `context_length` tokens, so that no place in a batch is padding.
Each document begins with one BOS where the tokenizer has one, and so does each window: models treat the first position
as a sink with a huge activation, and a window that starts in mid-document would put that outlier on an ordinary word.
That BOS is added in front of the cut, so packing neither loses nor repeats a token. `keep` marks the tokens that
count: special tokens (BOS, EOS, padding, chat marks) never reach an SAE or a metric.

A document that the chat template refuses, or that has a token without a row in the model's embedding, is skipped and
counted, as one that cannot be read.

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
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_msae.data.documents import DocumentsLike, Pass
from hf_msae.data.loading import as_documents
from hf_msae.data.rows import Chat, Document, TokenIds
from hf_msae.data.sources import DatasetError, UnreadableRow
from hf_msae.data.states import check_state
from hf_msae.errors import InputError
from hf_msae.special_tokens import special_token_ids

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
        vocab_size: rows of the model's embedding, see `vocabulary`; documents with other tokens are skipped. None
            takes all tokens.

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
        self,
        documents: DocumentsLike,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_length: int,
        pack: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        check_context_length(context_length)
        self.documents = as_documents(documents).view()
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.pack = pack
        self.encoder = DocumentEncoder(tokenizer, vocab_size)
        self._resume: dict[str, Any] | None = None
        # What was true when the current batch of documents began, and what has happened in it since.
        self._batch: dict[str, Any] = self._first_batch()
        self._batch_documents = self._batch_truncated = self._given = 0
        self._skipped: UnreadableRow | None = None

    @property
    def num_documents(self) -> int:
        """Documents read in the latest pass, in whole batches."""
        return self._batch["num_documents"] + self._batch_documents

    @property
    def num_windows(self) -> int:
        """Windows given in the latest pass."""
        return self._batch["num_windows"] + self._given

    @property
    def num_truncated(self) -> int:
        """Tokens cut off from long documents in the latest pass."""
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
        check_state(state, "given")
        batch = check_state(state.get("batch"), "num_documents", "num_windows", "num_truncated")
        check_state(batch.get("documents"), "next")
        carry = batch.get("carry")
        if not isinstance(carry, list) or not all(type(token) is int for token in carry):
            raise InputError(f"the state of the data is damaged: 'carry' is {carry!r:.80}, no list of token ids")
        theirs = {key: state.get(key) for key in self._settings()}
        if theirs != self._settings():
            raise InputError(f"the state was taken of windows with {theirs}, these have {self._settings()}")
        self._resume = copy.deepcopy(dict(state))

    def _settings(self) -> dict[str, Any]:
        return {"context_length": self.context_length, "pack": self.pack}

    def _first_batch(self) -> dict[str, Any]:
        counts = {"num_documents": 0, "num_windows": 0, "num_truncated": 0}
        return {"documents": self.documents.state_dict(), "carry": [], **counts}

    def _windows(self, reader: Pass, given: int) -> Iterator[Window]:
        last = False
        while not last:
            batch = list(islice(_numbered(reader), DOCUMENTS_PER_BATCH))
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
                + (f"; the latest of those that were skipped: {self._skipped}" if self._skipped else "")
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

    def _cut(
        self, batch: Sequence[tuple[int, Document]], carry: list[int], last: bool
    ) -> tuple[list[Window], list[int], int]:
        """The windows of a batch, the tokens left for the next batch, and the number of tokens cut off."""
        encoded = []
        for (number, _), ids in zip(batch, self.encoder.encode_each([document for _, document in batch]), strict=True):
            if isinstance(ids, UnreadableRow):
                self._skipped = ids
                self.documents.skip_document(number, ids)
            elif ids:
                encoded.append(ids)
        if self.pack:
            flat = carry + [token for ids in encoded for token in ids]
            windows, rest = self.encoder.pack(flat, self.context_length, last)
            return windows, rest, 0
        truncated = sum(max(0, len(ids) - self.context_length) for ids in encoded)
        return [self.encoder.window(ids[: self.context_length]) for ids in encoded], [], truncated


class DocumentEncoder:
    """Turns documents into token ids, and token ids into windows, by one rule for BOS and special tokens.

    The tokenizer adds the special tokens that it adds by itself; where it has a BOS (or a CLS) token and does not put
    it in front, as GPT-2's, it is put there. Text that holds it already gets no second one. `vocab_size` is the number
    of rows of the model's embedding; None takes every token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        start = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        # A BOS that was added to a tokenizer and not to its model is none.
        self.start_id = start if start is None or vocab_size is None or start < vocab_size else None
        self.special_ids = special_token_ids(tokenizer)
        self._special = torch.tensor(sorted(self.special_ids), dtype=torch.int64)

    def encode(self, documents: Sequence[Document]) -> list[list[int]]:
        """Token ids of each document; those without any token that counts are left out.

        Raises:
            UnreadableRow: one cannot be encoded.
        """
        encoded = self.encode_each(documents)
        for ids in encoded:
            if isinstance(ids, UnreadableRow):
                raise ids
        return [ids for ids in encoded if ids]  # type: ignore[misc]

    def encode_each(self, documents: Sequence[Document]) -> list[list[int] | UnreadableRow]:
        """Token ids of each document, or why it has none; empty where no token counts."""
        texts = iter(self._encode_texts([document for document in documents if isinstance(document, str)]))
        plain = [chat for chat in documents if not isinstance(chat, str | TokenIds) and not _tools_of(chat)]
        chats = iter(self._encode_chats(plain))
        encoded: list[list[int] | UnreadableRow] = []
        for document in documents:
            if isinstance(document, str):
                ids: list[int] | UnreadableRow = next(texts)
            elif isinstance(document, TokenIds):
                ids = list(document)
            else:
                ids = self._encode_chat(document) if _tools_of(document) else next(chats)
            encoded.append(ids if isinstance(ids, UnreadableRow) else self._checked(ids))
        return encoded

    def _checked(self, ids: list[int]) -> list[int] | UnreadableRow:
        if self.special_ids.issuperset(ids):
            return []
        lowest, highest = min(ids), max(ids)
        if lowest < 0 or (self.vocab_size is not None and highest >= self.vocab_size):
            return UnreadableRow(
                f"it has the token id {lowest if lowest < 0 else highest}, but the embedding of the model has "
                f"{self.vocab_size} rows; image tokens and tokens that were added to the tokenizer alone have none"
            )
        return self.start(ids)

    def window(self, ids: list[int]) -> Window:
        """The window of some token ids."""
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
            windows.append(self.window(self.start(ids[begin:end])))
            begin = end
        return windows, ids[begin:]

    def count(self, ids: list[int]) -> int:
        """The number of tokens that count."""
        return sum(token not in self.special_ids for token in ids)

    def start(self, ids: list[int]) -> list[int]:
        """With exactly one BOS in front, where there is one."""
        if self.start_id is None:
            return ids
        own = next((place for place, token in enumerate(ids) if token != self.start_id), len(ids))
        return ids[own - 1 :] if own else [self.start_id, *ids]

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: a document longer than the model reads is no mistake here, it is cut afterwards.
        return self.tokenizer(texts, verbose=False, return_attention_mask=False)["input_ids"]

    def _encode_chats(self, chats: list[Any]) -> list[list[int] | UnreadableRow]:
        if not chats:
            return []
        if self.tokenizer.chat_template is None:
            raise DatasetError(
                f"the documents are chats, but the tokenizer {self.tokenizer.name_or_path!r} has no chat template; "
                "use the tokenizer of a chat model, set tokenizer.chat_template, or choose a column with plain text"
            )
        try:
            return self._apply_template(chats)
        except Exception:  # one of them; templates fail in their own ways, each of them alone tells how
            return [self._encode_chat(chat) for chat in chats]

    def _encode_chat(self, chat: Any) -> list[int] | UnreadableRow:
        if self.tokenizer.chat_template is None:
            return self._encode_chats([chat])[0]
        try:
            return self._apply_template([chat], tools=_tools_of(chat))[0]
        except Exception as error:
            return UnreadableRow(f"the chat template refuses it ({type(error).__name__}: {error})")

    def _apply_template(self, chats: list[Any], tools: list[Any] | None = None) -> Any:
        kwargs: dict[str, Any] = {"return_dict": False, "tokenizer_kwargs": {"verbose": False}}
        return self.tokenizer.apply_chat_template(chats, tools=tools, tokenize=True, **kwargs)


def _tools_of(chat: Any) -> list[Any] | None:
    return chat.tools if isinstance(chat, Chat) else None


def vocabulary(model: PreTrainedModel) -> int:
    """How many token ids the model has rows for: those of its embedding, whatever its tokenizer says."""
    embedding = model.get_input_embeddings()
    return embedding.num_embeddings if isinstance(embedding, torch.nn.Embedding) else model.vocab_size


def pad_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> int:
    """A token to fill short windows with; it is masked, so that any with a row in the embedding will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None and (vocab_size is None or token < vocab_size))


def counted_ids(windows: Sequence[Window]) -> Tensor:
    """The tokens of windows that count, one after the other, (n,) int64."""
    return torch.cat([window.input_ids[window.keep] for window in windows])


class TokenBatch(TypedDict):
    """Token windows for a language model, each (batch, sequence); no mask where nothing is padded."""

    input_ids: Tensor
    attention_mask: Tensor | None
    keep: Tensor


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


def count_tokens(documents: DocumentsLike, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> int:
    """The exact number of tokens that count, by tokenizing all documents with a progress bar."""
    documents = as_documents(documents)
    encoder = DocumentEncoder(tokenizer, vocab_size)
    total = 0
    with logging.tqdm(total=documents.num_documents, desc="Counting tokens", unit=" documents") as progress:
        for batch in _batches(documents.view()):
            # What cannot be encoded is skipped, and named, where it is read to be used.
            total += sum(encoder.count(ids) for ids in encoder.encode_each(batch) if isinstance(ids, list))
            progress.update(len(batch))
    return total


def _numbered(reader: Pass) -> Iterator[tuple[int, Document]]:
    for document in reader:
        yield reader.number, document


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    reader = iter(documents)
    while batch := list(islice(reader, DOCUMENTS_PER_BATCH)):
        yield batch


def check_context_length(context_length: int) -> None:
    """Raise `InputError` for a length in which no token fits behind BOS."""
    if context_length < 2:
        raise InputError(f"context_length must be at least 2 (BOS and one token), got {context_length}")
