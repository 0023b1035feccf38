"""Where a run's activations come from: text through the language model, or a cache on disk.

A loader hands out batches without end (it starts the data again when it is used up, and says so), knows how much one
pass holds, and has a small state from which it continues bit for bit.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data import (
    TOKEN_IDS,
    ActivationStream,
    BatchIterator,
    CachedActivations,
    Documents,
    TokenWindows,
    Window,
    count_tokens,
    fingerprint,
    pad_id,
    vocabulary,
)
from hf_msae.data.populations import ROWS_OF_BATCH, Population
from hf_msae.errors import InputError
from hf_msae.modeling.devices import sent
from hf_msae.sites import Site
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.run import Run

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT_LENGTH = 512


def window_length(model: PreTrainedModel, args: SAETrainingArguments) -> int:
    """How many tokens a window has: as asked for, else what is usual and the model can read.

    Args:
        model: The language model.
        args: Of which `context_length` counts.

    Returns:
        Tokens per window.

    Raises:
        InputError: For more tokens than the model has positions.
    """
    config = model.config.get_text_config().to_dict()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    limit = next((config[name] for name in names if config.get(name)), None)
    if limit is not None:
        limit -= _unused_positions(model)
    if args.context_length is None:
        return min(DEFAULT_CONTEXT_LENGTH, limit or DEFAULT_CONTEXT_LENGTH)
    if limit is not None and args.context_length > limit:
        raise InputError(
            f"context_length={args.context_length} is more than the {limit} positions of "
            f"{model.config.name_or_path or 'the model'}."
        )
    return args.context_length


def _unused_positions(model: PreTrainedModel) -> int:
    """Rows of the embedding of positions that no token gets: RoBERTa and its kin count from behind the padding's."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, torch.nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def is_tensor_parallel(model: PreTrainedModel, num_processes: int) -> bool:
    """Whether the model is one copy that all processes run, on the same tokens.

    Raises:
        InputError: Where it is split over some of the processes only.
    """
    parts = model.tp_size or 1
    if parts not in (1, num_processes):
        raise InputError(
            f"The language model is split over {parts} processes, and the run has {num_processes}. Tensor parallel "
            "models must be split over all processes of the run."
        )
    return parts > 1


@dataclass(frozen=True)
class TextSource:
    """What turns documents into activations.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        sites: Where its activations are taken; `TOKEN_IDS` among them gives the tokens, too.
        context_length: Tokens of a window.
        tensor_parallel: Whether the model is one copy that all processes run together, on the same windows.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sites: Sequence[Site]
    context_length: int
    tensor_parallel: bool

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows."""
        return vocabulary(self.model)

    @property
    def pad_id(self) -> int:
        """The token id that fills windows up."""
        return pad_id(self.tokenizer, self.vocab_size)


class ActivationLoader(ABC):
    """A process's activations of each step, `{site: (batch, hidden_size)}` of all micro-batches, without end.

    Args:
        run: The run.

    Attributes:
        description: The data, in words.
        sliced: Whether all processes go through one order of tokens, each taking its slice of every step's batch.
        norm_limits: The largest norm that counts at each site, 0 for none; to be set before the first batch.
        epoch: Passes over the data that have ended.
        populations: What activations were like at each site, since this process began.
        on_read: As in `BatchIterator`.
    """

    description: str
    sliced: bool = False

    def __init__(self, run: Run) -> None:
        self.args, self.rank, self.num_processes, self.device = run.args, run.rank, run.num_processes, run.device
        self.epoch = 0
        self.norm_limits: dict[Site, float | None] = {}
        self.populations: dict[Site, Population] = {}
        self.on_read: Callable[[int, int], None] = lambda done, total: None
        self._batches: BatchIterator | None = None
        self._earlier_outliers = 0

    @property
    def num_outliers(self) -> int:
        """How many tokens this process has dropped because their norm is beyond the limit."""
        return self._earlier_outliers + (0 if self._batches is None else self._batches.num_filtered)

    def __next__(self) -> dict[Site, Tensor]:
        batches = self._current()
        try:
            batch = next(batches)
        except StopIteration:
            self.epoch += 1
            self._earlier_outliers += batches.num_filtered
            logger.warning(
                "The data ended after %s tokens; pass %d begins.", f"{batches.num_tokens:,}", self.epoch + 1
            )
            self._batches = None
            batch = next(self._current())
        # Once for all learners of a site, without waiting; what a language model gives is on its device already.
        batch = {site: sent(rows, self.device) if rows.device.type == "cpu" else rows for site, rows in batch.items()}
        for site, rows in batch.items():
            if site == TOKEN_IDS:
                continue
            some = Population.of(rows[:ROWS_OF_BATCH])
            self.populations[site] = self.populations[site] + some if site in self.populations else some
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place after the latest batch, JSON-able."""
        return {"epoch": self.epoch, "batches": self._current().state_dict(), "outliers": self._earlier_outliers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch after which `state` was taken."""
        self.epoch = state["epoch"]
        self._earlier_outliers = state["outliers"]
        self._batches = None
        self._current().load_state_dict(state["batches"])

    def _current(self) -> BatchIterator:
        if self._batches is None:
            # The multiplier keeps the passes of neighbouring seeds apart.
            self._batches = self._open(self.args.seed * 1_000_003 + self.epoch)
            self._batches.on_read = lambda done, total: self.on_read(done, total)
            if self.sliced:
                size = self.args.tokens_per_process
                self._batches.part = range(self.rank * size, (self.rank + 1) * size)
        return self._batches

    def count_steps(self) -> int:
        """Steps of the run: as asked for, else what `max_tokens` or one pass over the data gives.

        Raises:
            InputError: Where that is less than one step.
        """
        if self.args.max_steps > 0:
            return self.args.max_steps
        per_step = self.args.tokens_per_step(self.num_processes)
        tokens = self.args.max_tokens if self.args.max_tokens is not None else self.tokens_per_pass()
        if tokens < per_step:
            raise InputError(
                f"There are {tokens:,} tokens to train on, fewer than one step of {per_step:,}. Use more data, a "
                "smaller per_device_train_batch_size, or hold out fewer tokens (eval_tokens, calibration_tokens)."
            )
        return tokens // per_step

    @property
    def unreadable_documents(self) -> set[int]:
        """The numbers of the documents that this process could not read; what resumes a run adds to them."""
        return set()

    @abstractmethod
    def _open(self, seed: int) -> BatchIterator:
        """A fresh pass over the data."""

    @abstractmethod
    def tokens_per_pass(self) -> int:
        """Training tokens in one pass over the data, of all processes together."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Which data this is, JSON-able; to be asked before the first batch."""

    @abstractmethod
    def recorded_norm_limits(self) -> dict[Site, float | None] | None:
        """At each site the norm beyond which activations are outliers, where the data was chosen by it already."""


class TextLoader(ActivationLoader):
    """Activations of documents, made while they are used.

    Each process has its share of the documents; where all run one language model together, all have all documents, and
    each takes its slice of every step's batch.

    Args:
        run: The run.
        source: What turns them into activations.
        documents: What to train on.
    """

    def __init__(self, run: Run, source: TextSource, documents: Documents) -> None:
        super().__init__(run)
        self.source, self.documents, self.sliced = source, documents, source.tensor_parallel
        self.description = documents.description

    def _open(self, seed: int) -> ActivationStream:
        shard, num_shards = (0, 1) if self.sliced else (self.rank, self.num_processes)
        documents = self.documents.shuffle(seed) if self.args.shuffle else self.documents
        windows = TokenWindows(
            documents.shard(shard, num_shards),
            self.source.tokenizer,
            context_length=self.source.context_length,
            pack=self.args.packing,
            vocab_size=self.source.vocab_size,
        )
        return ActivationStream(
            self.source.model,
            self.source.sites,
            windows,
            batch_size=self.args.tokens_per_step(self.num_processes) // num_shards,
            block_tokens=self.args.block_tokens,
            lm_batch_size=self.args.lm_batch_size,
            seed=seed,
            shard=shard,
            norm_limits=self.norm_limits,
            pad_id=self.source.pad_id,
        )

    def draw_windows(self) -> list[Window]:
        """Windows with about as many tokens as the latest batch, from its block (`ActivationStream.draw_windows`)."""
        batches = self._current()
        assert isinstance(batches, ActivationStream)
        return batches.draw_windows(self.args.tokens_per_process)

    @property
    def unreadable_documents(self) -> set[int]:
        """The numbers of the documents that this process could not read; what resumes a run adds to them."""
        return self.documents.unreadable

    def tokens_per_pass(self) -> int:
        """Training tokens in one pass over the documents, of all processes together."""
        return count_tokens(self.documents, self.source.tokenizer, self.source.vocab_size)

    def fingerprint(self) -> dict[str, Any]:
        """Which documents these are, JSON-able; of a stream to be asked before the first batch."""
        return fingerprint(self.documents)

    def recorded_norm_limits(self) -> None:
        """None: they are found on held-out text."""


class CacheLoader(ActivationLoader):
    """Activations that `cache_activations` wrote, but for the first rows.

    The order of tokens is that of one process: each takes its slice of every step's batch. So a run is the same
    whatever the number of processes, and may go on with another. Shards are memory-mapped, so a process reads little
    more of them than its own rows.

    Args:
        run: The run.
        cache: The activations.
        sites: Which of them are used.
        skip_rows: How many of the first rows are held out.
    """

    sliced = True

    def __init__(self, run: Run, cache: CachedActivations, sites: Sequence[Site], skip_rows: int) -> None:
        super().__init__(run)
        self.cache, self.sites, self.skip_rows = cache, sites, skip_rows
        self.description = cache.files.description
        self._open(self.args.seed)  # a cache without one of the sites is refused before anything long begins

    def _open(self, seed: int) -> CachedActivations:
        return CachedActivations(
            self.cache.files,
            batch_size=self.args.tokens_per_step(self.num_processes),
            seed=seed,
            sites=self.sites,
            skip_rows=self.skip_rows,
        )

    def tokens_per_pass(self) -> int:
        """Rows of the cache that are not held out."""
        return self._open(self.args.seed).num_available

    def fingerprint(self) -> dict[str, Any]:
        """Which cache this is, JSON-able."""
        return self.cache.fingerprint()

    def recorded_norm_limits(self) -> dict[Site, float | None]:
        """Those by which the cache was written: outliers are not in it."""
        return {site: self.cache.norm_limit(site) for site in self.sites}
