"""One SAE's batch, and its micro-batches, which together are the batch: what they must know of the whole is here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_msae.modeling import MatryoshkaSAE
from hf_msae.modeling.objective import BatchContext
from hf_msae.modeling.selection import ProcessGroup
from hf_msae.modeling.sparse_encoder import ActiveLatents


@dataclass(frozen=True)
class SAEBatch:
    """What one SAE reads of a batch.

    Args:
        x: Activations, (n, hidden_size).
        target: Of a transcoder, what it is to reconstruct of them, (n, output_size).
        token_ids: Of a tokenized SAE, the token of each, (n,).
    """

    x: Tensor
    target: Tensor | None = None
    token_ids: Tensor | None = None

    def __len__(self) -> int:
        """How many activations there are."""
        return len(self.x)

    @property
    def wanted(self) -> Tensor:
        """What is to be reconstructed."""
        return self.x if self.target is None else self.target

    def map(self, change: Callable[[Tensor], Tensor]) -> "SAEBatch":
        """The batch with each of its tensors changed."""
        target, token_ids = (None if tensor is None else change(tensor) for tensor in (self.target, self.token_ids))
        return SAEBatch(change(self.x), target, token_ids)

    def split(self, size: int) -> "list[SAEBatch]":
        """Micro-batches of so many activations; the last may have fewer."""
        xs = self.x.split(size)
        absent = [None] * len(xs)
        targets = absent if self.target is None else self.target.split(size)
        token_ids = absent if self.token_ids is None else self.token_ids.split(size)
        return [SAEBatch(*part) for part in zip(xs, targets, token_ids, strict=True)]


def batch_contexts(
    sae: MatryoshkaSAE, batch: SAEBatch, parts: Sequence[SAEBatch], options: Mapping[str, Any], ranks: ProcessGroup
) -> list[BatchContext]:
    """What each micro-batch must know of the step's whole batch, of all processes.

    Args:
        sae: The SAE, in training mode.
        batch: This process's batch.
        parts: Its micro-batches.
        options: Of the step, as `MatryoshkaSAE.forward` takes them: `k`, `prefix_sizes` and `variance`.
        ranks: The processes that have other tokens of the same batch.

    Returns:
        One for each micro-batch.
    """
    if len(parts) == 1 and ranks.size == 1:
        return [BatchContext()]
    config, k, variance = sae.config, options["k"], options["variance"]
    active = sae.select(batch.x, k, variance, ranks)
    own: list[ActiveLatents | None] = [None] * len(parts)
    if active is not None:
        own = [*active.split([len(part) for part in parts])]
    l0 = level_errors = None
    if config.activation == "jumprelu":
        count = sae.ranks.sum(sae.count_active(batch.x, active))
        l0 = ranks.sum(count.float() / len(batch)) / ranks.size
    if config.log_loss:
        sizes = options["prefix_sizes"]
        errors = [
            sae.level_errors(part.x, mine, k, sizes, variance, part.target, part.token_ids)
            for part, mine in zip(parts, own, strict=True)
        ]
        shares = [len(part) / len(batch) for part in parts]
        mean = torch.stack([error * share for error, share in zip(errors, shares, strict=True)]).sum(0)
        level_errors = ranks.sum(mean) / ranks.size
    return [BatchContext(active, l0, level_errors) for active in own]
