"""Data that no SAE is trained on: some to set inference thresholds with, some to measure on.

The two are kept apart, so that the L0 that is reported is that of a threshold which never saw those tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data import (
    CachedActivations,
    Documents,
    Window,
    collate,
    find_norm_limits,
    harvest,
    hold_out,
    pad_id,
    split_of,
    vocabulary,
)
from hf_msae.metrics import TokenBatch
from hf_msae.sites import Site
from hf_msae.training.arguments import SAETrainingArguments


class HeldOut(ABC):
    """Held-out activations, given anew in every pass.

    together: whether all processes must ask for the same at the same time, because they run one language model.
    facts: how it was chosen, JSON-able.
    """

    together: bool = False
    facts: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def calibration(self, rank: int = 0, world_size: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        """One process's share of the activations for setting thresholds."""

    @abstractmethod
    def evaluation(self, rank: int = 0, world_size: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        """One process's share of the activations for measuring."""

    @abstractmethod
    def find_norm_limits(self, multiple: float | None) -> dict[Site, float | None]:
        """At each site the norm beyond which activations are outliers, 0 for none, None where it is not known."""

    @abstractmethod
    def token_batches(self) -> Iterator[TokenBatch]:
        """Token batches for measuring cross-entropy, `args.ce_tokens` in all; none where there is no text."""


class HeldOutText(HeldOut):
    """Documents that a hash of their contents chose, through the language model whenever they are needed.

    `together`: the language model is one copy that all processes run, so each goes through all windows, and keeps its
    share of the activations. `split` is what training must leave out, where it reads the same documents; `facts` what
    metrics.json says of them. Raises `DatasetError` where the dataset has too few tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sites: Sequence[Site],
        documents: Documents,
        args: SAETrainingArguments,
        context_length: int,
        together: bool = False,
    ) -> None:
        self.model, self.sites, self.args, self.together = model, sites, args, together
        vocab_size = vocabulary(model)
        self.pad_id = pad_id(tokenizer, vocab_size)
        common = (documents, tokenizer, context_length)
        measuring = hold_out(*common, args.eval_tokens, args.packing, vocab_size=vocab_size)
        calibration = hold_out(
            *common, args.calibration_tokens, args.packing, purpose="calibration", vocab_size=vocab_size
        )
        self.split = split_of(measuring, calibration, documents)
        self.facts = {"measuring": measuring.facts(), "calibration": calibration.facts()}
        self._evaluation, self._calibration = measuring.windows, calibration.windows

    def calibration(self, rank: int = 0, world_size: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        return self._harvest(self._calibration, rank, world_size)

    def evaluation(self, rank: int = 0, world_size: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        return self._harvest(self._evaluation, rank, world_size)

    def _harvest(self, windows: Sequence[Window], rank: int, world_size: int) -> Iterator[Mapping[Site, Tensor]]:
        options = {"lm_batch_size": self.args.lm_batch_size, "pad_id": self.pad_id}
        if self.together:
            yield from islice(harvest(self.model, self.sites, windows, **options), rank, None, world_size)
        else:
            yield from harvest(self.model, self.sites, windows[rank::world_size], **options)

    def find_norm_limits(self, multiple: float | None) -> dict[Site, float | None]:
        found = find_norm_limits(
            self.model,
            self.sites,
            self._evaluation,
            multiple=multiple,
            lm_batch_size=self.args.lm_batch_size,
            pad_id=self.pad_id,
        )
        return {**found}

    def token_batches(self) -> Iterator[TokenBatch]:
        return collated(self.model, self._evaluation, self.args.ce_tokens, self.args.lm_batch_size, self.pad_id)


class HeldOutCache(HeldOut):
    """The first rows of an activation cache. They come from the same documents as the rows after them, in part."""

    def __init__(self, cache: CachedActivations, args: SAETrainingArguments) -> None:
        self.args = args
        self.num_rows = args.eval_tokens + args.calibration_tokens
        self._rows = cache.first_rows(self.num_rows)
        self._norm_limits = {site: cache.norm_limit(site) for site in cache.sites}

    def calibration(self, rank: int = 0, world_size: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        return self._slices(self.args.eval_tokens, self.num_rows, rank, world_size)

    def evaluation(self, rank: int = 0, world_size: int = 1) -> Iterator[Mapping[Site, Tensor]]:
        return self._slices(0, self.args.eval_tokens, rank, world_size)

    def find_norm_limits(self, multiple: float | None) -> dict[Site, float | None]:
        return self._norm_limits

    def token_batches(self) -> Iterator[TokenBatch]:
        return iter(())

    def _slices(self, start: int, stop: int, rank: int, world_size: int) -> Iterator[Mapping[Site, Tensor]]:
        size = self.args.per_device_train_batch_size
        for low in range(start + rank * size, stop, world_size * size):
            yield {site: rows[low : min(stop, low + size)] for site, rows in self._rows.items()}


def collated(
    model: PreTrainedModel, windows: Sequence[Window], num_tokens: int, lm_batch_size: int, pad_id: int
) -> Iterator[TokenBatch]:
    """The first windows with at least `num_tokens` tokens that count (all where there are fewer), `lm_batch_size` at a
    time, on the model's device.
    """
    device = next(model.get_input_embeddings().parameters()).device
    taken = 0
    for start in range(0, len(windows), lm_batch_size):
        if taken >= num_tokens:
            return
        batch = collate(windows[start : start + lm_batch_size], pad_id)
        taken += int(batch["keep"].sum())
        mask = batch["attention_mask"]
        yield {
            "input_ids": batch["input_ids"].to(device),
            "attention_mask": None if mask is None else mask.to(device),
            "keep": batch["keep"].to(device),
        }
