"""Where a run's activations come from: text through the language model, or a cache on disk.

A feed hands out batches without end (it starts the data again when it is used up, and says so), knows how much one
pass holds, and has a small state from which it continues bit for bit.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data import (
    ActivationStream,
    BatchIterator,
    CachedActivations,
    Documents,
    TokenWindows,
    as_documents,
    count_tokens,
    pad_id,
    vocabulary,
)
from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import Site
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.held_out import HeldOut, HeldOutCache, HeldOutText

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT_LENGTH = 512


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


def window_length(model: PreTrainedModel, args: SAETrainingArguments) -> int:
    """Tokens per window; refuses more than the model's positions."""
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


def runs_together(model: PreTrainedModel, world_size: int) -> bool:
    """Whether the model is one tensor-parallel copy that all processes run, on the same tokens. Raises `ValueError`
    where only some of them do.
    """
    parts = model.tp_size or 1
    if parts not in (1, world_size):
        raise InputError(
            f"The language model is split over {parts} processes, and the run has {world_size}. Tensor parallel "
            "models must be split over all processes of the run."
        )
    return parts > 1


def open_data(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    saes: Mapping[str, MatryoshkaSAE],
    sites: Sequence[Site],
    args: SAETrainingArguments,
    train_dataset: Any,
    eval_dataset: Any,
    rank: int,
    world_size: int,
) -> tuple[HeldOut, Feed, Documents | None]:
    """What is held out, what is trained on, and its documents where it has any; the windows' form is written into the
    SAEs' configurations.
    """
    held_out: HeldOut | None = None
    together = model is not None and runs_together(model, world_size)
    if model is not None and tokenizer is not None:
        context_length = window_length(model, args)
        if eval_dataset is not None:
            documents = as_documents(eval_dataset)
            held_out = HeldOutText(model, tokenizer, sites, documents, args, context_length, together)
    if isinstance(train_dataset, CachedActivations):
        skip_rows = 0
        if held_out is None:
            held_out = HeldOutCache(train_dataset, args)
            skip_rows = held_out.num_rows
        return held_out, CacheFeed(train_dataset, sites, args, skip_rows, rank, world_size), None
    if model is None or tokenizer is None:
        raise InputError("Training on text needs the language model and its tokenizer (processing_class).")
    documents = as_documents(train_dataset)
    if held_out is None:
        held_out = HeldOutText(model, tokenizer, sites, documents, args, context_length, together)
        documents = documents.without(held_out.split)
    for sae in saes.values():
        sae.config.context_length = context_length
        sae.config.prepend_bos = tokenizer.bos_token_id is not None
    feed = TextFeed(model, tokenizer, sites, documents, args, context_length, rank, world_size, together)
    return held_out, feed, documents


def set_norm_limits(
    saes: Mapping[str, MatryoshkaSAE],
    sites: Mapping[str, Site],
    feed: Feed,
    held_out: HeldOut,
    resumed: Mapping[str, MatryoshkaSAEConfig],
) -> None:
    """Say which activations are outliers, to the feed and in every SAE's configuration: as in the checkpoint that the
    run goes on from (`resumed`, the configurations in it), else as the main process finds it.
    """
    limits: dict[Site, float | None]
    if resumed:
        limits = {sites[name]: config.norm_limit for name, config in resumed.items()}
    else:
        # All processes look, for they may run one language model together. What they find differs by rounding.
        limits = broadcast_object_list([feed.find_norm_limits(held_out)])[0]
    feed.norm_limits = limits
    for name, sae in saes.items():
        sae.config.norm_limit = limits.get(sites[name])


def count_steps(args: SAETrainingArguments, feed: Feed, num_processes: int) -> int:
    """Steps of the run: as asked for, else what `max_tokens` or one pass over the data gives."""
    if args.max_steps > 0:
        return args.max_steps
    per_step = args.tokens_per_step(num_processes)
    tokens = args.max_tokens if args.max_tokens is not None else feed.tokens_per_pass()
    if tokens < per_step:
        raise InputError(
            f"There are {tokens:,} tokens to train on, fewer than one step of {per_step:,}. Use more data, a smaller "
            "per_device_train_batch_size, or hold out fewer tokens (eval_tokens, calibration_tokens)."
        )
    return tokens // per_step
