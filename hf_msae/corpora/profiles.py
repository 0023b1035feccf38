"""A corpus as the documents in it and what each latent is worth there: read from text, or from latents of a data set.

Equal documents count once: a text that a corpus repeats a hundred times is no hundred observations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from hf_msae.corpora.encoded import EncodedLatents
from hf_msae.corpora.encoded_files import EncodedError, ragged_latents, read_rows, row_groups
from hf_msae.corpora.rank_tests import Values
from hf_msae.corpora.reading import LatentReader
from hf_msae.corpora.rows import Pool, PooledRows, TokenRows, keep_documents, pool_rows, ragged_places
from hf_msae.data import Documents
from hf_msae.data.randomness import seeded_generator
from hf_msae.errors import InputError


class CorpusError(InputError):
    """Corpora that cannot be compared."""


@dataclass(frozen=True)
class TokenPlace:
    """Where a latent is largest in a document.

    Args:
        token_ids: of the document, of the tokens that count, (t,) int64.
        index: of the token among them.
        value: of the latent there.
    """

    token_ids: Tensor
    index: int
    value: float


@dataclass
class Profile:
    """What was read of a corpus.

    Args:
        called: what people call it.
        pool: how tokens were pooled.
        latents, values, documents: of each entry that is above 0: its latent, its value and its document, (n,).
        num_tokens: of each document.
        texts: of each document; empty where they are not known.
        token_ids: of each document, (t,) int64, those that count; empty where they are not known.
        peaks, largest: of each entry, the index of the token with the largest activation among `token_ids`, and this
            activation; without meaning where tokens are not known.
        num_repeated: documents that were left out because an equal one was there.
    """

    called: str
    pool: Pool
    latents: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    documents: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    peaks: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    largest: Tensor = field(default_factory=lambda: torch.empty(0))
    num_tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    token_ids: list[Tensor] = field(default_factory=list)
    num_repeated: int = 0

    def __len__(self) -> int:
        return len(self.num_tokens)

    def of_latents(self, num_latents: int) -> Values:
        """The values of the first latents, for tests.

        Args:
            num_latents: how many there are.
        """
        kept = self.latents < num_latents
        return Values(len(self), self.latents[kept], self.values[kept])

    def strongest(self, latent: int, most: int) -> list[int]:
        """The documents in which a latent is largest, the first of them first.

        Args:
            latent: its number.
            most: how many documents.
        """
        entries = (self.latents == latent).nonzero().flatten()
        order = self._strength()[entries].argsort(descending=True, stable=True)[:most]
        return entries[order].tolist()

    def _strength(self) -> Tensor:
        return self.largest if self.token_ids else self.values

    def place(self, entry: int) -> TokenPlace | None:
        """Where an entry's latent is largest; None where tokens are not known.

        Args:
            entry: as `strongest` gives it.
        """
        if not self.token_ids:
            return None
        ids = self.token_ids[int(self.documents[entry])]
        return TokenPlace(ids, int(self.peaks[entry]), float(self.largest[entry]))

    def text(self, entry: int) -> str | None:
        """The text of an entry's document; None where it is not known.

        Args:
            entry: as `strongest` gives it.
        """
        return self.texts[int(self.documents[entry])] if self.texts else None

    def peak_tokens(self, latent: int) -> Tensor:
        """The token on which a latent is largest, of each document in which it fires, (n,) int64; may be empty.

        Args:
            latent: its number.
        """
        if not self.token_ids:
            return torch.empty(0, dtype=torch.int64)
        entries = (self.latents == latent).nonzero().flatten().tolist()
        places = [self.place(entry) for entry in entries]
        return torch.stack([place.token_ids[place.index] for place in places if place is not None])


class _Gatherer:
    """Adds up the blocks of a corpus."""

    def __init__(self, called: str, pool: Pool, max_documents: int) -> None:
        self.profile, self.max_documents = Profile(called, pool), max_documents
        self._seen: set[tuple[int, ...] | str] = set()
        self._parts: list[tuple[Tensor, ...]] = []

    @property
    def is_full(self) -> bool:
        return len(self.profile) >= self.max_documents

    def choose(self, keys: Sequence["tuple[int, ...] | str"]) -> Tensor:
        """Which documents of a block count, bool (n,): those that are new, as long as there is room."""
        chosen: list[bool] = []
        room = self.max_documents - len(self.profile)
        for key in keys:
            new = key not in self._seen
            self.profile.num_repeated += not new
            self._seen.add(key)
            chosen.append(new and sum(chosen) < room)
        return torch.tensor(chosen)

    def add_tokens(self, rows: TokenRows, num_documents: int, texts: list[str]) -> None:
        """Rows of tokens; `texts` is empty where they are not known."""
        counts = torch.bincount(rows.documents, minlength=num_documents).tolist()
        ids = rows.token_ids.split(counts)
        kept = self.choose([tuple(part.tolist()) for part in ids])
        # A document all of whose tokens are outliers says nothing.
        kept &= torch.tensor(counts) > 0
        rows, here = keep_documents(rows, kept), kept.nonzero().flatten().tolist()
        pooled = pool_rows(rows, len(here), self.profile.pool)
        # Positions count special tokens; what is kept of a document has none.
        begins = pooled.num_tokens.cumsum(0) - pooled.num_tokens
        places = torch.arange(len(rows)) - begins[rows.documents]
        owners = torch.repeat_interleave(pooled.counts)
        width = 1 + int(rows.positions.max()) if len(rows) else 1
        found = torch.searchsorted(rows.documents * width + rows.positions, owners * width + pooled.peaks)
        self._add(pooled, places[found] if len(found) else found)
        self.profile.token_ids += [ids[index] for index in here]
        self.profile.texts += [texts[index] for index in here] if texts else []

    def add_documents(self, pooled: PooledRows, texts: list[str]) -> None:
        """Rows of documents."""
        chosen = self.choose(texts).nonzero().flatten()
        entries = ragged_places(pooled.counts, chosen)
        entry_columns = (pooled.latents, pooled.values, pooled.peaks, pooled.largest)
        latents, values, peaks, largest = (column[entries] for column in entry_columns)
        kept = PooledRows(pooled.num_tokens[chosen], pooled.counts[chosen], latents, values, peaks, largest)
        self._add(kept, peaks)
        self.profile.texts += [texts[index] for index in chosen.tolist()]

    def _add(self, pooled: PooledRows, peaks: Tensor) -> None:
        documents = len(self.profile) + torch.repeat_interleave(pooled.counts)
        self._parts.append((pooled.latents, pooled.values.float(), documents, peaks, pooled.largest.float()))
        self.profile.num_tokens += pooled.num_tokens.tolist()

    def finish(self) -> Profile:
        if self._parts:
            columns = [torch.cat(parts) for parts in zip(*self._parts, strict=True)]
            profile = self.profile
            profile.latents, profile.values, profile.documents, profile.peaks, profile.largest = columns
        return self.profile


def profile_of_text(
    reader: LatentReader,
    documents: Documents,
    *,
    pool: Pool,
    max_documents: int,
    document_tokens: int | None,
    seed: int,
    called: str,
) -> Profile:
    """Read documents from all parts of some text.

    Args:
        reader: of latents.
        documents: the text.
        pool: of a document's tokens.
        max_documents: how many different documents are enough.
        document_tokens: so many of each document are read; None reads all.
        seed: of the order.
        called: what people call the corpus.
    """
    gatherer = _Gatherer(called, pool, max_documents)
    blocks = reader.blocks(documents.shuffle(seed), document_tokens=document_tokens, max_documents=max_documents)
    total = min(max_documents, documents.num_documents or max_documents)
    with logging.tqdm(total=total, desc=f"Reading {called}", unit=" documents") as progress:
        for block, rows in reader.read_all(blocks):
            gatherer.add_tokens(rows, len(block.numbers), block.texts)
            progress.update(len(block.numbers))
    return gatherer.finish()


def profile_of_latents(
    encoded: EncodedLatents,
    *,
    pool: Pool,
    max_documents: int,
    document_tokens: int | None,
    seed: int,
    called: str,
) -> Profile:
    """Read latents of documents from all parts of a data set.

    Args:
        encoded: the data set.
        pool: of a document's tokens, where they were not pooled yet.
        max_documents: how many different documents are enough.
        document_tokens: so many tokens of each document count; None for all.
        seed: of the order.
        called: what people call the corpus.

    Raises:
        EncodedError: documents were pooled already, in another way or of whole documents where `document_tokens` is
            given; or files are damaged.
    """
    if encoded.pool is not None and encoded.pool != pool:
        raise EncodedError(
            f"The latents {encoded.folder} are the documents' {encoded.pool}, and {pool} is compared; encode one of "
            "the corpora again, or give text."
        )
    if encoded.pool is not None and document_tokens is not None:
        raise EncodedError(
            f"The latents {encoded.folder} are pooled over whole documents, so that no document_tokens can be taken; "
            "encode tokens (without --pool), or give text."
        )
    gatherer = _Gatherer(called, pool, max_documents)
    for rows in _token_blocks(encoded, seed) if encoded.pool is None else ():
        if document_tokens is not None:
            rows = _first_tokens(rows, document_tokens)
        gatherer.add_tokens(rows, 1 + int(rows.documents.max()) if len(rows) else 0, [])
        if gatherer.is_full:
            break
    for pooled, texts in _document_blocks(encoded, seed) if encoded.pool is not None else ():
        gatherer.add_documents(pooled, texts)
        if gatherer.is_full:
            break
    return gatherer.finish()


def _groups_in_order(encoded: EncodedLatents, seed: int) -> list[tuple[Path, int]]:
    groups = row_groups(encoded.folder, encoded.index)
    order = torch.randperm(len(groups), generator=seeded_generator(seed, 0))
    return [groups[place] for place in order.tolist()]


def _token_blocks(encoded: EncodedLatents, seed: int) -> Iterator[TokenRows]:
    for path, number in _groups_in_order(encoded, seed):
        table = read_rows(path, number, ["document", "position", "token_id", "latents", "values"])
        counts, latents, values = ragged_latents(table, encoded.index, path)
        # The rows of a token's levels follow one another.
        step = table.num_rows // max(1, len(counts))
        columns = [torch.tensor(table.column(name).to_numpy())[::step] for name in table.schema.names[:3]]
        numbers, positions, token_ids = (column.long() for column in columns)
        documents = numbers.unique_consecutive(return_inverse=True)[1]
        yield TokenRows(documents, positions, token_ids, counts, latents, values)


def _document_blocks(encoded: EncodedLatents, seed: int) -> Iterator[tuple[PooledRows, list[str]]]:
    for path, number in _groups_in_order(encoded, seed):
        table = read_rows(path, number, ["num_tokens", "text", "latents", "values"])
        counts, latents, values = ragged_latents(table, encoded.index, path)
        step = table.num_rows // max(1, len(counts))
        num_tokens = torch.tensor(table.column("num_tokens").to_numpy()).long()[::step]
        texts = table.column("text").to_pylist()[::step]
        yield PooledRows(num_tokens, counts, latents, values, torch.zeros_like(latents), values), texts


def _first_tokens(rows: TokenRows, document_tokens: int) -> TokenRows:
    return rows.take((rows.positions < document_tokens).nonzero().flatten())
