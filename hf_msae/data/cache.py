"""Activations on disk: written once from a stream, read many times as one.

Training many dictionaries on the same site repeats the same forward passes. `cache_activations` writes a stream's
batches into safetensors shards, one tensor per site, and `CachedActivations` reads them back, shuffled anew in every
epoch, with the interface of `ActivationStream`. A token of a 2,304-wide model in bfloat16 takes 4.6 kB per site, so
100 million take 460 GB: cache what is read more than once.

A cache is written into a folder beside its own name and renamed when it is whole, so a cache that exists is complete.
The folder keeps the stream's state after each shard; the same call made again continues there. Ranks do not share out
whole shards but rows of every shard, so all have exactly the same number of batches and none waits for another at the
end.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from hf_msae.atomic_files import atomic_file
from hf_msae.data.cache_files import (
    FORMAT,
    VERSION,
    CacheError,
    CacheFiles,
    CacheFolder,
    read_progress,
    sha256_of_file,
    shard_name,
)
from hf_msae.data.documents import DocumentsLike
from hf_msae.data.fingerprints import fingerprint
from hf_msae.data.randomness import seeded_generator
from hf_msae.data.states import check_state
from hf_msae.data.stream import ActivationStream, BatchIterator
from hf_msae.data.unfinished import UnfinishedFolder
from hf_msae.errors import InputError
from hf_msae.quantization import quantization_of
from hf_msae.sites import Site


def cache_activations(
    stream: ActivationStream, directory: str | Path, *, max_tokens: int, shard_tokens: int = 2**17
) -> Path:
    """Writes a stream's activations to disk, in the dtype in which the model gives them.

    Args:
        stream: a stream that has not given a batch yet.
        directory: the folder to make. What is written before it is whole lies in `<directory>.incomplete`; calling
            again with the same stream and settings continues it.
        max_tokens: the most tokens to write; rounded down to whole batches. Fewer are written where the data ends
            before.
        shard_tokens: tokens per shard, rounded down to whole batches; a reader holds one shard in memory.

    Returns:
        The folder: shards `activations-00000.safetensors`, ... with one tensor (tokens, hidden_size) per site, and
        `index.json` with what they were made from.

    Raises:
        CacheError: the folder exists, or the unfinished one was begun with other settings; or the disk is too small.
        ValueError: `max_tokens` is less than one batch, or the stream was already used.
    """
    directory = Path(directory)
    if max_tokens < stream.batch_size:
        raise InputError(f"max_tokens ({max_tokens:,}) is less than one batch of the stream ({stream.batch_size:,})")
    if stream.num_tokens:
        raise InputError("the stream has already given batches; pass a fresh one, so that the cache is complete")
    if directory.exists():
        raise CacheError(f"{directory} already exists; remove it, or choose another folder for the cache")
    writer = _CacheWriter(stream, directory, max(1, shard_tokens // stream.batch_size), max_tokens)
    return writer.write()


class _CacheWriter:
    """One run of `cache_activations`."""

    def __init__(self, stream: ActivationStream, directory: Path, shard_batches: int, max_tokens: int) -> None:
        self.stream = stream
        self.directory = directory
        self.folder = UnfinishedFolder(directory, "an unfinished cache", CacheError, read_progress)
        self.shard_batches = shard_batches
        self.max_tokens = max_tokens
        self.data = fingerprint(stream.windows.documents)
        self.shards: list[dict[str, Any]] = []
        self.hidden_sizes: dict[str, int] = {}
        self.dtypes: dict[str, str] = {}

    def write(self) -> Path:
        self._begin()
        with logging.tqdm(total=self.max_tokens, desc="Caching activations", unit=" tokens") as progress:
            progress.update(self.stream.num_tokens)
            # Blocks are read as a whole before the first of their tokens is written.
            self.stream.on_read = lambda done, _: progress.update(self._ahead_of(progress.n, done))
            while batches := self._next_batches():
                self._write_shard(batches)
                progress.update(self._ahead_of(progress.n, 0))
        index = {"format": FORMAT, "version": VERSION, "num_tokens": self.stream.num_tokens, "shards": self.shards}
        index |= {"hidden_sizes": self.hidden_sizes, "dtypes": self.dtypes, **self._settings()}
        index |= {"num_outliers": self.stream.num_filtered}
        return self.folder.finish(index)

    def _ahead_of(self, shown: int, waiting: int) -> int:
        """Tokens that were read and are not shown yet; so many of these are still to be given out."""
        return max(0, min(self.max_tokens, self.stream.num_tokens + waiting) - shown)

    def _settings(self) -> dict[str, Any]:
        """What the cache was made from; an unfinished cache is continued only where this is the same."""
        windows, model = self.stream.windows, self.stream.model
        return {
            "base_model": model.name_or_path,
            "quantization": quantization_of(model),
            "tokenizer": windows.tokenizer.name_or_path,
            "dataset": windows.documents.description,
            "data": self.data,
            "context_length": windows.context_length,
            "pack": windows.pack,
            "batch_size": self.stream.batch_size,
            "shard_batches": self.shard_batches,
            **self.stream.settings,
        }

    def _begin(self) -> None:
        """Makes the unfinished folder, or takes up the one that an earlier run left."""
        progress = self.folder.begin(self._settings())
        if progress is None:
            return
        self.shards = progress["shards"]
        self.hidden_sizes, self.dtypes = progress["hidden_sizes"], progress["dtypes"]
        try:
            self.stream.load_state_dict(progress["stream"])
        except InputError as error:
            raise self.folder.no_place(error) from error

    def _next_batches(self) -> list[dict[Site, Tensor]]:
        batches: list[dict[Site, Tensor]] = []
        while len(batches) < self.shard_batches and self.stream.num_tokens + self.stream.batch_size <= self.max_tokens:
            batch = next(self.stream, None)
            if batch is None:
                break
            if not self.hidden_sizes:
                self._describe(batch)
            batches.append({site: rows.cpu() for site, rows in batch.items()})
        return batches

    def _describe(self, batch: Mapping[Site, Tensor]) -> None:
        self.hidden_sizes = {str(site): rows.shape[1] for site, rows in batch.items()}
        self.dtypes = {str(site): str(rows.dtype).removeprefix("torch.") for site, rows in batch.items()}
        token_bytes = sum(rows.shape[1] * rows.element_size() for rows in batch.values())
        free = shutil.disk_usage(self.folder.path).free
        if token_bytes * self.max_tokens > free:
            raise CacheError(
                f"{self.max_tokens:,} tokens need {token_bytes * self.max_tokens / 1e9:.1f} GB, but the disk of "
                f"{self.directory} has {free / 1e9:.1f} GB free; lower max_tokens or choose another disk"
            )

    def _write_shard(self, batches: Sequence[Mapping[Site, Tensor]]) -> None:
        name = shard_name(len(self.shards))
        tensors = {str(site): torch.cat([batch[site] for batch in batches]) for site in batches[0]}
        with atomic_file(self.folder.path / name) as draft:
            save_file(tensors, draft)
            digest = sha256_of_file(draft)
        num_tokens = len(batches) * self.stream.batch_size
        self.shards.append({"file": name, "num_tokens": num_tokens, "sha256": digest})
        progress = {"shards": self.shards, "stream": self.stream.state_dict()}
        progress |= {"hidden_sizes": self.hidden_sizes, "dtypes": self.dtypes}
        self.folder.save(self._settings(), progress)


class CachedActivations(BatchIterator):
    """Shuffled batches from an activation cache, with the interface of `ActivationStream`.

    The order of the shards and the order of rows in each are pure in (seed, rank, epoch, shard). A rank reads its own
    equal share of the rows of every shard, from a memory-mapped file; one share is in memory at a time. Batches are on
    the CPU.

    Args:
        directory: what `cache_activations` wrote; or where its files come from while they are read, as
            `hf_msae.load_activation_cache` gives it of a cache on the Hub.
        batch_size: rows per batch; need not be that of the stream.
        seed: fixes all orders.
        sites: the sites to read; None reads all.
        rank: which of the processes that share the cache this is.
        world_size: how many they are.
        epochs: how many times to go through it.
        skip_rows: leave out this many rows, from the first shard on: those that `first_rows` gives.

    Attributes:
        index: the contents of index.json.
        files: where its files come from.
        num_available: rows that this rank will see, over all epochs.
        num_tokens, num_dropped: as in `BatchIterator`. A remainder of a shard that does not divide by `world_size` is
            left out, and is not counted as dropped.

    Raises:
        CacheError: there is no complete cache, a shard is missing or damaged, or a site is unknown.
    """

    def __init__(
        self,
        directory: str | Path | CacheFiles,
        *,
        batch_size: int,
        seed: int = 0,
        sites: Sequence[Site | str] | None = None,
        rank: int = 0,
        world_size: int = 1,
        epochs: int = 1,
        skip_rows: int = 0,
    ) -> None:
        super().__init__(batch_size)
        if not 0 <= rank < world_size or epochs < 1:
            raise InputError(
                f"expected 0 <= rank < world_size and epochs >= 1, got rank {rank} of {world_size}, {epochs} epochs"
            )
        self.files = directory if isinstance(directory, CacheFiles) else CacheFolder(Path(directory))
        self.index = self.files.read_index()
        self.sites = _choose_sites(self.index, self.files.description, sites)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epochs = epochs
        self._skipped = self._skip(skip_rows)
        self.num_available = epochs * sum(map(self._share, range(len(self.index["shards"]))))
        self._number = -1  # Shards begun, over all epochs.
        self._state = self._place()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch after which `state` was taken; reads that batch's shard again.

        Raises `ValueError` where the state is of a reader with another order.
        """
        check_state(state, "shard")
        if state.get("settings") != self.settings:
            raise InputError(
                f"the state was taken of a cache read with {state.get('settings')}, this one: {self.settings}"
            )
        self._number = state["shard"] - 1
        self._restore(state)

    @property
    def directory(self) -> Path:
        """Where its files lie on this machine."""
        return self.files.directory

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which token comes when."""
        tokens = [shard["num_tokens"] for shard in self.index["shards"]]
        order = {"seed": self.seed, "rank": self.rank, "world_size": self.world_size, "skipped": self._skipped}
        return order | {"shard_tokens": tokens}

    def fingerprint(self) -> dict[str, Any]:
        """What tells this cache from others, wherever it lies; as `data.fingerprint` does of documents."""
        return self.files.fingerprint()

    def norm_limit(self, site: Site) -> float | None:
        """The largest norm that counted at a site when the cache was written.

        Returns:
            0 where all counted; None where an older version wrote the cache and it is not known.
        """
        limits = self.index.get("norm_limits")
        return None if limits is None else limits.get(str(site), 0.0)

    def first_rows(self, num_rows: int) -> dict[Site, Tensor]:
        """The first rows of the cache, `{site: (num_rows, hidden_size)}`: the same whatever the seed and rank.

        Raises CacheError where the cache has fewer.
        """
        taken = zip(self.index["shards"], self._skip(num_rows), strict=True)
        parts = [self._read(shard, 0, rows) for shard, rows in taken if rows]
        return {site: torch.cat([part[site] for part in parts]) for site in self.sites}

    def _skip(self, num_rows: int) -> list[int]:
        """How many of each shard's rows are among the first `num_rows` of all."""
        skipped, left = [], num_rows
        for shard in self.index["shards"]:
            skipped.append(min(left, shard["num_tokens"]))
            left -= skipped[-1]
        if left:
            raise CacheError(
                f"{self.files.description} holds {num_rows - left:,} tokens, fewer than the {num_rows:,} "
                "that are to be kept apart; write a larger cache, or hold out fewer"
            )
        return skipped

    def _read(self, shard: Mapping[str, Any], start: int, stop: int) -> dict[Site, Tensor]:
        with safe_open(self.files.shard(shard["file"]), framework="pt") as file:
            return {site: file.get_slice(str(site))[start:stop] for site in self.sites}

    def _place(self) -> dict[str, Any]:
        used_up = self._position == len(self._order)
        return {
            "num_tokens": self.num_tokens,
            "num_dropped": self.num_dropped,
            "settings": self.settings,
            "shard": self._number + used_up,
            "position": 0 if used_up else self._position,
        }

    def _share(self, shard: int) -> int:
        """Rows of one shard that belong to each rank."""
        return (self.index["shards"][shard]["num_tokens"] - self._skipped[shard]) // self.world_size

    def _advance(self) -> bool:
        shards = self.index["shards"]
        if self._number + 1 == self.epochs * len(shards):
            return False
        self._number += 1
        epoch, place = divmod(self._number, len(shards))
        order = torch.randperm(len(shards), generator=seeded_generator(self.seed, self.rank, epoch))
        shard, *later = order[place:].tolist()
        rows = self._share(shard)
        begin = self._skipped[shard] + self.rank * rows
        # Let go of the last shard before the next is read, so that only one is in memory.
        self._block = {}
        self._block = self._read(shards[shard], begin, begin + rows)
        self.files.expect([shards[number]["file"] for number in later])
        self._order = torch.randperm(rows, generator=seeded_generator(self.seed, self.rank, epoch, shard))
        return True


def _choose_sites(index: Mapping[str, Any], called: str, sites: Sequence[Site | str] | None) -> list[Site]:
    known = list(index["hidden_sizes"])
    chosen = known if sites is None else [str(Site.parse(str(site))) for site in sites]
    unknown = [site for site in chosen if site not in known]
    if unknown or not chosen:
        raise CacheError(
            f"{called} has no site {', '.join(unknown) or '(none was named)'}; it has: {', '.join(known)}"
        )
    return [Site.parse(site) for site in chosen]


# What a run may be trained on: text, through the language model, or activations that were written down.
TrainingData: TypeAlias = "CachedActivations | DocumentsLike"
