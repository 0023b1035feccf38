"""Where a run's activations come from: text through the language model, or a cache on disk.

A feed hands out batches without end (it starts the data again when it is used up, and says so), knows how much one
pass holds, and has a small state from which it continues bit for bit.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data import (
    ActivationStream,
    BatchIterator,
    CachedActivations,
    Documents,
    TokenWindows,
    count_tokens,
    pad_id,
    vocabulary,
)
from hf_msae.sites import Site
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.held_out import HeldOut

logger = logging.getLogger(__name__)


class Feed(ABC):
    """A process's activations of each step, `{site: (batch, hidden_size)}` of all micro-batches, without end.

    sliced: whether all processes go through one order of tokens, each taking its slice of every step's batch.
    norm_limits: the largest norm that counts at each site, 0 for none; to be set before the first batch.
    """

    description: str
    sliced: bool = False

    def __init__(self, args: SAETrainingArguments, rank: int, world_size: int) -> None:
        self.args, self.rank, self.world_size = args, rank, world_size
        self.epoch = 0
        self.norm_limits: dict[Site, float | None] = {}
        self._batches: BatchIterator | None = None
        self._earlier_outliers = 0

    @property
    def num_outliers(self) -> int:
        """How many tokens this process has dropped because their norm is beyond the limit."""
        return self._earlier_outliers + (0 if self._batches is None else self._batches.num_filtered)

    def __next__(self) -> dict[Site, Tensor]:
        batch = self._batch()
        if not self.sliced:
            return batch
        own = slice(self.rank * self.args.tokens_per_process, (self.rank + 1) * self.args.tokens_per_process)
        return {site: rows[own] for site, rows in batch.items()}

    def _batch(self) -> dict[Site, Tensor]:
        batches = self._current()
        try:
            return next(batches)
        except StopIteration:
            self.epoch += 1
            self._earlier_outliers += batches.num_filtered
            logger.warning(
                "The data ended after %s tokens; pass %d begins.", f"{batches.num_tokens:,}", self.epoch + 1
            )
            self._batches = None
            return next(self._current())

    def state_dict(self) -> dict[str, Any]:
        """The place after the latest batch, JSON-able."""
        return {"epoch": self.epoch, "batches": self._current().state_dict(), "outliers": self._earlier_outliers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch after which `state` was taken."""
        self.epoch = state["epoch"]
        self._earlier_outliers = state.get("outliers", 0)
        self._batches = None
        self._current().load_state_dict(state["batches"])

    def _current(self) -> BatchIterator:
        if self._batches is None:
            # The multiplier keeps the passes of neighbouring seeds apart.
            self._batches = self._open(self.args.seed * 1_000_003 + self.epoch)
        return self._batches

    def find_norm_limits(self, held_out: HeldOut) -> dict[Site, float | None]:
        """At each site the norm beyond which activations are outliers: found on held-out text."""
        return held_out.find_norm_limits(self.args.norm_outlier_multiple)

    @abstractmethod
    def _open(self, seed: int) -> BatchIterator:
        """A fresh pass over the data."""

    @abstractmethod
    def tokens_per_pass(self) -> int:
        """Training tokens in one pass over the data, of all processes together."""


class TextFeed(Feed):
    """Activations of documents, made while they are used.

    Each process has its share of the documents. `together`: the language model is one copy that all processes run, so
    all have all documents, and each takes its slice of every step's batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sites: Sequence[Site],
        documents: Documents,
        args: SAETrainingArguments,
        context_length: int,
        rank: int,
        world_size: int,
        together: bool = False,
    ) -> None:
        super().__init__(args, rank, world_size)
        self.model, self.tokenizer, self.sites, self.documents = model, tokenizer, sites, documents
        self.context_length, self.sliced = context_length, together
        self.description = documents.description

    def _open(self, seed: int) -> ActivationStream:
        shard, num_shards = (0, 1) if self.sliced else (self.rank, self.world_size)
        documents = self.documents.shuffle(seed) if self.args.shuffle else self.documents
        windows = TokenWindows(
            documents.shard(shard, num_shards),
            self.tokenizer,
            context_length=self.context_length,
            pack=self.args.packing,
            vocab_size=vocabulary(self.model),
        )
        return ActivationStream(
            self.model,
            self.sites,
            windows,
            batch_size=self.args.tokens_per_process * self.world_size // num_shards,
            block_tokens=self.args.block_tokens,
            lm_batch_size=self.args.lm_batch_size,
            seed=seed,
            shard=shard,
            norm_limits=self.norm_limits,
            pad_id=pad_id(self.tokenizer, vocabulary(self.model)),
        )

    def tokens_per_pass(self) -> int:
        return count_tokens(self.documents, self.tokenizer, vocabulary(self.model))


class CacheFeed(Feed):
    """Activations that `cache_activations` wrote, but for the first `skip_rows`.

    The order of tokens is that of one process: each takes its slice of every step's batch. So a run is the same
    whatever the number of processes, and may go on with another. The price is that every process reads, and holds,
    each shard as a whole.
    """

    sliced = True

    def __init__(
        self,
        cache: CachedActivations,
        sites: Sequence[Site],
        args: SAETrainingArguments,
        skip_rows: int,
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__(args, rank, world_size)
        self.directory, self.sites, self.skip_rows = cache.directory, sites, skip_rows
        self.description = f"the activation cache {cache.directory}"

    def _open(self, seed: int) -> CachedActivations:
        return CachedActivations(
            self.directory,
            batch_size=self.args.tokens_per_process * self.world_size,
            seed=seed,
            sites=self.sites,
            skip_rows=self.skip_rows,
        )

    def find_norm_limits(self, held_out: HeldOut) -> dict[Site, float | None]:
        """Those by which the cache was written: outliers are not in it."""
        cache = self._open(self.args.seed)
        return {site: cache.norm_limit(site) for site in self.sites}

    def tokens_per_pass(self) -> int:
        return self._open(self.args.seed).num_available
