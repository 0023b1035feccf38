"""Data sets of latents: what an SAE sees in each token or document of some text, as Parquet that anybody can read.

One pass of the language model until the site, the SAE, and a row for each token or, pooled, for each document. In
memory are the rows of one block of documents; a block becomes a row group of a Parquet file. A shard appears when it
is whole, and after each the place in the text is noted, so a run that was killed goes on behind the last whole shard
and writes what it would have written.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_msae.atomic_files import atomic_file
from hf_msae.corpora.blocks import Block, DocumentBlocks
from hf_msae.corpora.card import render_card
from hf_msae.corpora.encoded import EncodedLatents
from hf_msae.corpora.encoded_files import (
    CARD_NAME,
    DTYPES,
    FORMAT,
    VERSION,
    EncodedError,
    document_table,
    read_progress,
    shard_name,
    token_table,
)
from hf_msae.corpora.reading import LatentReader, sae_fingerprint
from hf_msae.corpora.rows import POOLS, Pool, TokenRows, pool_rows
from hf_msae.data import DatasetError, Documents, as_documents, fingerprint
from hf_msae.data.documents import DocumentsLike
from hf_msae.data.unfinished import UnfinishedFolder
from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.outliers import NORM_OUTLIER_MULTIPLE

if TYPE_CHECKING:
    from pyarrow import Table

# Tokens whose rows are in memory at once, a row group of a file.
BLOCK_TOKENS = 2**15


def encode_dataset(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: MatryoshkaSAE,
    documents: DocumentsLike,
    folder: str | Path,
    *,
    pool: Pool | None = None,
    by_level: bool = False,
    dtype: str = "float32",
    max_tokens: int | None = None,
    site: str | None = None,
    context_length: int | None = None,
    packing: bool = False,
    lm_batch_size: int = 16,
    norm_outlier_multiple: float | None = NORM_OUTLIER_MULTIPLE,
    shard_tokens: int = 262_144,
) -> EncodedLatents:
    """Write the active latents of every token that counts, or of every document, as Parquet with a card.

    Special tokens and outliers have no row; documents without any other token have none either. A run that was
    interrupted goes on with the same call.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        sae: in evaluation mode, whole or truncated to a prefix; it is moved to where the model is.
        documents: `Documents`, or what `as_documents` takes.
        folder: to make. What is written before it is whole lies in `<folder>.incomplete`.
        pool: "max", "mean" or "sum" over the tokens of a document gives it a row, instead of one for each token.
        by_level: whether each level has a row of its own, with the latents that it adds.
        dtype: of the values, "float32" or "float16".
        max_tokens: reading ends with the document that brings the tokens that count to this number; None reads all.
        site: where the SAE reads; by default what its configuration records.
        context_length: tokens per window; by default what the SAE was trained with, or else 256. A longer document
            goes on in the next window.
        packing: whether a window may hold several documents, as in training, of which later ones then see earlier
            ones. By default the latents of a document depend on itself alone.
        lm_batch_size: windows per forward pass.
        norm_outlier_multiple: where the SAE records no limit, activations of this many times the median norm are left
            out as outliers; None or 0 keeps all.
        shard_tokens: tokens per file, about; what a killed run writes again at most.

    Returns:
        What was written, opened; `datasets.load_dataset(str(folder))` reads it, too.

    Raises:
        EncodedError: the folder exists, or the unfinished one was begun with other settings.
        InputError: the SAE does not fit the model, or a number is out of its bounds.
        DatasetError: no document has a token that counts.
        ActivationError: activations are NaN or infinite.
    """
    folder = Path(folder)
    _check_arguments(pool, dtype, max_tokens, shard_tokens)
    if folder.exists():
        raise EncodedError(f"{folder} already exists; remove it, or choose another folder for the latents.")
    reader = LatentReader(
        model,
        tokenizer,
        sae,
        site=site,
        context_length=context_length,
        packing=packing,
        lm_batch_size=lm_batch_size,
        norm_outlier_multiple=norm_outlier_multiple,
    )
    form = {"pool": pool, "by_level": by_level, "dtype": dtype}
    return _Writer(reader, as_documents(documents), folder, form, max_tokens, shard_tokens).write()


def _check_arguments(pool: str | None, dtype: str, max_tokens: int | None, shard_tokens: int) -> None:
    if pool is not None and pool not in POOLS:
        raise InputError(f"pool is {', '.join(POOLS)} or None, got {pool!r}.")
    if dtype not in DTYPES:
        raise InputError(f"dtype is {' or '.join(DTYPES)}, got {dtype!r}.")
    if shard_tokens < 1 or (max_tokens is not None and max_tokens < 1):
        raise InputError(f"max_tokens and shard_tokens must be at least 1, got {max_tokens} and {shard_tokens}.")


class _Writer:
    """One run of `encode_dataset`."""

    def __init__(
        self,
        reader: LatentReader,
        documents: Documents,
        folder: Path,
        form: dict[str, Any],
        max_tokens: int | None,
        shard_tokens: int,
    ) -> None:
        self.reader, self.documents, self.form = reader, documents, form
        self.max_tokens, self.shard_tokens = max_tokens, shard_tokens
        self.folder = UnfinishedFolder(folder, "unfinished latents", EncodedError, read_progress)
        # Asked before any pass begins: of a stream it reads the first rows.
        self.data = fingerprint(documents)
        self.shards: list[dict[str, Any]] = []

    def write(self) -> EncodedLatents:
        settings = self._settings()
        progress = self.folder.begin(settings)
        if progress is None:
            self.reader.find_norm_limit(self.documents)
        else:
            self.reader.norm_limit, self.shards = progress["norm_limit"], progress["shards"]
            self.reader.num_outliers = progress["num_outliers"]
        blocks = self.reader.blocks(
            self.documents, block_tokens=min(BLOCK_TOKENS, self.shard_tokens), max_tokens=self.max_tokens
        )
        if progress is not None:
            self._resume(blocks, progress["blocks"])
        self._write_shards(blocks, settings)
        if not blocks.num_documents:
            raise DatasetError(f"No document of {self.documents.description} has a token that is not special.")
        index = {"format": FORMAT, "version": VERSION, **self._facts(), **settings, "shards": self.shards}
        index |= {"norm_limit": self.reader.norm_limit, "num_outliers": self.reader.num_outliers}
        index |= {"num_tokens": blocks.num_tokens, "num_documents": blocks.num_documents}
        index |= {"num_unreadable": blocks.num_unreadable}
        with atomic_file(self.folder.path / CARD_NAME) as draft:
            draft.write_text(render_card(index, self.folder.directory), encoding="utf-8")
        return EncodedLatents(self.folder.finish(index))

    def _resume(self, blocks: DocumentBlocks, state: dict[str, Any]) -> None:
        try:
            blocks.load_state_dict(state)
        except InputError as error:
            raise self.folder.no_place(error) from error

    def _settings(self) -> dict[str, Any]:
        """What is written is made from; an unfinished folder is continued only where this is the same."""
        config, reader = self.reader.sae.config, self.reader
        return {
            "sae_fingerprint": sae_fingerprint(reader.sae),
            "prefix_sizes": list(config.prefix_sizes),
            "site": str(reader.site),
            "base_model": config.base_model or reader.model.name_or_path,
            "tokenizer": reader.tokenizer.name_or_path,
            "dataset": self.documents.description,
            "data": self.data,
            "context_length": reader.context_length,
            "packing": reader.packing,
            "max_tokens": self.max_tokens,
            "shard_tokens": self.shard_tokens,
            **self.form,
        }

    def _facts(self) -> dict[str, Any]:
        """What is of interest, and no reason to begin anew."""
        config = self.reader.sae.config
        return {
            "sae": str(config.name_or_path or ""),
            "base_model_revision": config.base_model_revision,
            "adapter": config.adapter,
        }

    def _write_shards(self, blocks: DocumentBlocks, settings: dict[str, Any]) -> None:
        found = self.reader.read_all(blocks)
        with logging.tqdm(total=self.max_tokens, desc="Encoding", unit=" tokens", unit_scale=True) as progress:
            progress.update(blocks.num_tokens)
            while shard := self._write_shard(found, blocks, progress):
                self.shards.append(shard)
                saved: dict[str, Any] = {"shards": self.shards, "blocks": blocks.state_dict()}
                saved |= {"norm_limit": self.reader.norm_limit, "num_outliers": self.reader.num_outliers}
                self.folder.save(settings, saved)

    def _write_shard(
        self, found: Iterator[tuple[Block, TokenRows]], blocks: DocumentBlocks, progress: Any
    ) -> dict[str, Any] | None:
        """Write blocks until there are tokens enough; None where there is none left."""
        from pyarrow import parquet

        name, num_rows, begun = shard_name(len(self.shards)), 0, blocks.num_tokens
        with ExitStack() as stack:
            writer = None
            while blocks.num_tokens - begun < self.shard_tokens:
                before = blocks.num_tokens
                block, rows = next(found, (None, None))
                if block is None or rows is None:
                    break
                table = self._table(block, rows)
                if writer is None:
                    draft = stack.enter_context(atomic_file(self.folder.path / name))
                    # Values are all different, so a dictionary of them would only take time.
                    writer = stack.enter_context(
                        parquet.ParquetWriter(draft, table.schema, compression="zstd", use_dictionary=_REPEATED)
                    )
                # A row group a block, so that a document lies in one of them.
                writer.write_table(table, row_group_size=max(1, table.num_rows))
                num_rows += table.num_rows
                progress.update(blocks.num_tokens - before)
        return None if writer is None else {"file": name, "num_rows": num_rows}

    def _table(self, block: Block, rows: TokenRows) -> "Table":
        config = self.reader.sae.config
        numbers = torch.tensor(block.numbers)
        sizes = list(config.prefix_sizes) if self.form["by_level"] else None
        if self.form["pool"] is None:
            return token_table(rows, numbers, sizes, self.form["dtype"])
        pooled = pool_rows(rows, len(block.numbers), self.form["pool"])
        return document_table(pooled, numbers, block.texts, sizes, self.form["dtype"])


# The columns whose values repeat.
_REPEATED = ["document", "token_id", "text", "level"]
