"""The files of a data set of latents: Parquet shards, an index that says what they are of, and a card for the Hub.

    README.md                the card; `datasets.load_dataset` reads from it which files are data
    index.json               the SAE, the text, how it was read, and the rows of each shard
    latents-00000.parquet    rows

A row is a token, a document where they were pooled, or a level of one of them. The folder may be somebody else's, so
its index is checked before anything that it says is believed.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_msae.corpora.rows import POOLS, PooledRows, TokenRows, counts_by_level
from hf_msae.data.unfinished import (
    INDEX,
    MAX_INDEX_BYTES,
    PROGRESS,
    are_shards,
    check_contents,
    is_mapping,
    read_contents,
    unfinished_folder,
)
from hf_msae.errors import InputError
from hf_msae.modeling.untrusted import read_json

if TYPE_CHECKING:
    from pyarrow import Table
    from pyarrow.parquet import ParquetFile

FORMAT, VERSION = "hf_msae.latents", 1
CARD_NAME = "README.md"
SHARDS = "latents-*.parquet"
SHARD_NAME = re.compile(r"latents-\d{5,}\.parquet")
DTYPES = ("float32", "float16")
FLOAT16_MAX = 65_504.0


class EncodedError(InputError):
    """A data set of latents that is missing, incomplete, damaged, or of something else than was asked for."""


def shard_name(number: int) -> str:
    """The name of a shard by its number."""
    return f"latents-{number:05d}.parquet"


def is_encoded(folder: str | Path) -> bool:
    """Whether a folder holds a data set of latents, damaged or not."""
    index = Path(folder) / INDEX
    if not index.is_file():
        return False
    try:
        return read_json(index, max_bytes=MAX_INDEX_BYTES).get("format") == FORMAT
    except ValueError:
        return any(Path(folder).glob(SHARDS))


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a complete data set of latents whose shards are all there.

    Args:
        folder: with the files.

    Raises:
        EncodedError: there is none, it is of another version, or it is damaged.
    """
    if not is_encoded(folder):
        unfinished = unfinished_folder(folder)
        if (unfinished / PROGRESS).exists():
            raise EncodedError(
                f"The latents {folder} are incomplete (they lie in {unfinished}); give the same `hf-msae encode` "
                "again to finish them."
            )
        raise EncodedError(f"There are no latents at {folder}; `hf-msae encode` writes them.")
    index = read_contents(folder / INDEX, EncodedError, "it")
    if index.get("version") != VERSION:
        raise EncodedError(
            f"The latents {folder} have version {index.get('version')!r:.20}, this hf_msae reads {VERSION}; write "
            "them anew."
        )
    check_contents(index, folder / INDEX, _CONTENTS, EncodedError, "it")
    for shard in index["shards"]:
        if not (folder / shard["file"]).is_file():
            raise EncodedError(f"The shard {folder / shard['file']} is missing; write or fetch the latents anew.")
    return index


def read_progress(path: Path) -> dict[str, Any]:
    """What a run that wrote part of it has left. Raises `EncodedError` where it is damaged."""
    progress = read_contents(path, EncodedError, "it")
    checks: dict[str, Callable[[Any], bool]] = {
        "settings": is_mapping,
        "shards": _are_shards,
        "blocks": is_mapping,
        "norm_limit": lambda value: isinstance(value, int | float),
        "num_outliers": _is_count,
    }
    check_contents(progress, path, checks, EncodedError, "it")
    return progress


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(size) is int and size > 0 for size in value)


def _are_shards(value: Any) -> bool:
    return are_shards(value, SHARD_NAME, "num_rows", least=0)


_CONTENTS: dict[str, Callable[[Any], bool]] = {
    "shards": _are_shards,
    "sae_fingerprint": _is_text,
    "sae": _is_text,
    "base_model": _is_text,
    "site": _is_text,
    "prefix_sizes": _are_sizes,
    "dataset": _is_text,
    "data": is_mapping,
    "tokenizer": _is_text,
    "pool": lambda value: value is None or value in POOLS,
    "by_level": lambda value: isinstance(value, bool),
    "num_tokens": _is_count,
    "num_documents": _is_count,
}


# Rows to tables


def token_table(rows: TokenRows, numbers: Tensor, sizes: list[int] | None, dtype: str) -> "Table":
    """The table of some tokens.

    Args:
        rows: of the tokens.
        numbers: of the block's documents, (num_documents,) int64.
        sizes: the prefixes, where each level of a token has a row; else None.
        dtype: of the values.
    """
    import pyarrow as pa

    columns = {
        "document": pa.array(numbers[rows.documents].numpy()),
        "position": pa.array(rows.positions.int().numpy()),
        "token_id": pa.array(rows.token_ids.int().numpy()),
    }
    return _with_latents(columns, rows.counts, rows.latents, rows.values, sizes, dtype)


def document_table(
    rows: PooledRows, numbers: Tensor, texts: list[str], sizes: list[int] | None, dtype: str
) -> "Table":
    """The table of some documents.

    Args:
        rows: of the documents.
        numbers: of the documents, (num_documents,) int64.
        texts: of the documents.
        sizes: the prefixes, where each level of a document has a row; else None.
        dtype: of the values.
    """
    import pyarrow as pa

    columns = {
        "document": pa.array(numbers.numpy()),
        "num_tokens": pa.array(rows.num_tokens.int().numpy()),
        "text": pa.array(texts, type=pa.string()),
    }
    return _with_latents(columns, rows.counts, rows.latents, rows.values, sizes, dtype)


def _with_latents(
    columns: dict[str, Any], counts: Tensor, latents: Tensor, values: Tensor, sizes: list[int] | None, dtype: str
) -> "Table":
    """The columns with latents, values and, where there are levels, a row for each of them."""
    import pyarrow as pa

    if dtype == "float16" and len(values) and float(values.max()) > FLOAT16_MAX:
        raise EncodedError(
            f"A latent has the activation {float(values.max()):.5g}, and float16 ends at {FLOAT16_MAX:,.0f}; write "
            "float32."
        )
    if sizes is not None:
        levels = torch.arange(len(sizes)).repeat(len(counts))
        repeated = torch.repeat_interleave(torch.arange(len(counts)), len(sizes)).numpy()
        columns = {name: column.take(pa.array(repeated)) for name, column in columns.items()}
        columns["level"] = pa.array(levels.int().numpy())
        counts = counts_by_level(counts, latents, sizes).flatten()
    offsets = pa.array(torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int().numpy())
    numbers = pa.array(latents.int().numpy())
    written = pa.array((values.half() if dtype == "float16" else values).numpy())
    columns["latents"] = pa.ListArray.from_arrays(offsets, numbers)
    columns["values"] = pa.ListArray.from_arrays(offsets, written)
    return pa.table(columns)


def row_groups(folder: Path, index: Mapping[str, Any]) -> list[tuple[Path, int]]:
    """Where the rows of each block lie: the shard, and the number of its row group. A document lies in one of them.

    Args:
        folder: with the files.
        index: `read_index` gave it.

    Raises:
        EncodedError: a shard is damaged, or has other rows than the index says.
    """
    found = []
    for shard in index["shards"]:
        path = folder / shard["file"]
        metadata = _reading(path, lambda file: file.metadata)
        if metadata.num_rows != shard["num_rows"]:
            raise EncodedError(
                f"The shard {path} has {metadata.num_rows:,} rows, its index says {shard['num_rows']:,}; write or "
                "fetch the latents anew."
            )
        found += [(path, number) for number in range(metadata.num_row_groups)]
    return found


def read_rows(path: Path, number: int, columns: list[str]) -> "Table":
    """The rows of one block.

    Args:
        path: of the shard.
        number: of the row group.
        columns: those to read.

    Raises:
        EncodedError: the shard is damaged, or lacks a column.
    """
    table = _reading(path, lambda file: file.read_row_group(number, columns=columns))
    if table.schema.names != columns:
        raise EncodedError(
            f"The shard {path} has of the columns {', '.join(columns)} only {', '.join(table.schema.names)}; write or "
            "fetch the latents anew."
        )
    return table


def ragged_latents(table: "Table", index: Mapping[str, Any], where: Path) -> tuple[Tensor, Tensor, Tensor]:
    """The active latents of some rows, those of a token's or document's levels joined.

    Args:
        table: of rows, with the columns latents and values.
        index: of the data set.
        where: they are read, for the error.

    Returns:
        How many each token or document has, (n,) int64, and of all of them the latents, int64, and values, float32.

    Raises:
        EncodedError: they are none of this SAE's, or damaged.
    """
    columns = [table.column(name).combine_chunks() for name in ("latents", "values")]
    step = len(index["prefix_sizes"]) if index["by_level"] else 1
    if not any(column.null_count for column in columns) and table.num_rows % step == 0:
        counts, of_values = (torch.tensor(column.value_lengths().to_numpy()).long() for column in columns)
        latents, values = (torch.tensor(column.flatten().to_numpy(zero_copy_only=False)) for column in columns)
        latents, values = latents.long(), values.float()
        inside = (latents >= 0) & (latents < index["prefix_sizes"][-1])
        if torch.equal(counts, of_values) and bool((inside & (values >= 0) & values.isfinite()).all()):
            return counts.view(-1, step).sum(1), latents, values
    raise EncodedError(
        f"The shard {where} holds rows that the SAE of its index does not give; write the latents anew."
    )


def _reading(path: Path, read: Callable[["ParquetFile"], Any]) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            return read(file)
    except (OSError, pa.ArrowException) as error:
        raise EncodedError(
            f"The shard {path} is damaged ({error!s:.200}); write or fetch the latents anew."
        ) from error
