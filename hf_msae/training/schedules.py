"""What changes from step to step: learning rate, k, p, levels, and in which steps what counts.

All are pure functions of the step, so that a resumed run needs no scheduler state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_msae.modeling import MatryoshkaSAEConfig
from hf_msae.training.arguments import SAETrainingArguments


def _steps(value: float, max_steps: int, share_up_to: float) -> float:
    """A number of steps, or a share of all of them."""
    return value * max_steps if value <= share_up_to else value


def learning_rate_factor(
    step: int, max_steps: int, args: SAETrainingArguments, extensions: Sequence[tuple[int, int]] = ()
) -> float:
    """Compute the learning rate of a step: linear warm-up, constant, decay to zero.

    Where the run was given another length, the schedule is that of the new length, but the rate rises to it from where
    it was, over the warm-up of the steps that are left.

    Args:
        step: The step, from 0.
        max_steps: Length of the run as it was first planned.
        args: The arguments of the run.
        extensions: (From step, steps in all) each time the run was given another length.

    Returns:
        The share of the peak learning rate.
    """
    if not extensions:
        return _plain_factor(step, max_steps, args)
    *earlier, (begin, length) = extensions
    before = learning_rate_factor(begin - 1, max_steps, args, earlier)
    rewarm = _steps(args.warmup_steps, length - begin, share_up_to=1 - 1e-9)
    rising = before + (step - begin + 1) / rewarm if rewarm else 1.0
    return min(rising, _plain_factor(step, length, args))


def _plain_factor(step: int, max_steps: int, args: SAETrainingArguments) -> float:
    warmup = _steps(args.warmup_steps, max_steps, share_up_to=1 - 1e-9)
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    decay = _steps(args.decay_steps, max_steps, share_up_to=1)
    if args.lr_scheduler_type == "constant" or decay == 0:
        return factor
    left = min(1.0, (max_steps - step) / decay)
    return factor * (left if args.lr_scheduler_type == "linear" else (1 - math.cos(math.pi * left)) / 2)


def annealed_k(step: int, max_steps: int, config: MatryoshkaSAEConfig, args: SAETrainingArguments) -> float:
    """Compute the k of a step, which falls linearly from `k_initial` to `config.k` (as in sparsify).

    Args:
        step: The step, from 0.
        max_steps: Length of the run.
        config: Of the SAE.
        args: The arguments of the run.

    Returns:
        Active latents per token.
    """
    steps = _steps(args.k_anneal_steps, max_steps, share_up_to=1 - 1e-9)
    if step >= steps:
        return config.k
    initial = args.k_initial if args.k_initial is not None else min(8 * config.k, config.num_latents / 4)
    return config.k + (max(initial, config.k) - config.k) * (1 - step / steps)


def annealed_p(step: int, max_steps: int, config: MatryoshkaSAEConfig, args: SAETrainingArguments) -> float:
    """Compute the p of a step's penalty, which falls from 1 to `config.p_end` (arXiv:2408.00113).

    It falls by as much at `n_sparsity_updates` steps, the first of them `p_anneal_start`, the last so long before the
    end as they are apart.

    Args:
        step: The step, from 0.
        max_steps: Length of the run.
        config: Of the SAE.
        args: The arguments of the run.

    Returns:
        The exponent, from 1 down.
    """
    start = math.ceil(_steps(args.p_anneal_start, max_steps, share_up_to=1 - 1e-9))
    if step < start or config.p_end == 1:
        return 1.0
    updates = args.n_sparsity_updates
    done = (step - start) * updates // max(1, max_steps - start) + 1
    return float(config.p_end) if done >= updates else 1 + (config.p_end - 1) * done / updates


def next_p(step: int, max_steps: int, config: MatryoshkaSAEConfig, args: SAETrainingArguments) -> float | None:
    """Find the p to which that of a step changes within `sparsity_queue_length` steps, which must then be measured.

    Args:
        step: The step, from 0.
        max_steps: Length of the run.
        config: Of the SAE.
        args: The arguments of the run.

    Returns:
        The next p; None where it stays.
    """
    p = annealed_p(step, max_steps, config, args)
    ahead = range(step + 1, step + 1 + args.sparsity_queue_length) if config.p_end < 1 else ()
    return next((later for at in ahead if (later := annealed_p(at, max_steps, config, args)) != p), None)


def passes_all_gradients(step: int, max_steps: int, args: SAETrainingArguments) -> bool:
    """Whether a step is before `inner_share_start`, so that inner levels pass all of their gradients on.

    Args:
        step: The step, from 0.
        max_steps: Length of the run.
        args: The arguments of the run.
    """
    return step < _steps(args.inner_share_start, max_steps, share_up_to=1 - 1e-9)


def sorting_steps(max_steps: int, args: SAETrainingArguments) -> range:
    """Give the steps whose activations count for the order that latents get in the step after them.

    They are the second half of those before, because the first latents to learn are not the ones that stay large.

    Args:
        max_steps: Length of the run.
        args: The arguments of the run.

    Returns:
        The steps; `stop` is -1 where latents are never sorted.
    """
    if args.sort_latents_at is None:
        return range(-1, -1)
    stop = max(1, math.ceil(_steps(args.sort_latents_at, max_steps, share_up_to=1 - 1e-9)))
    return range(stop // 2, stop)


def counts_divergence(
    step: int, max_steps: int, args: SAETrainingArguments, extensions: Sequence[tuple[int, int]] = ()
) -> bool:
    """Whether a step is one of the last, in which the language model's predictions count (`kl_from`).

    Args:
        step: The step, from 0.
        max_steps: Length of the run as it was first planned.
        args: The arguments of the run.
        extensions: (From step, steps in all) each time the run was given another length; the latest one counts.
    """
    if args.kl_from is None:
        return False
    length = extensions[-1][1] if extensions else max_steps
    return step >= _steps(args.kl_from, length, share_up_to=1 - 1e-9)


def sample_prefix_sizes(step: int, config: MatryoshkaSAEConfig, seed: int) -> list[int]:
    """Draw the levels of a step without replacement, small ones more often, and the whole dictionary.

    P(l) ∝ (l/L)^α - ((l-1)/L)^α for l = 1 … L = num_latents - 1, a truncated Pareto law of density l^(α-1) (Nabeshima,
    "Matryoshka Sparse Autoencoders", 2024).

    Args:
        step: The step, from 0.
        config: Of the SAE.
        seed: Of the run.

    Returns:
        Prefix sizes, rising.
    """
    # A per-step generator (the multiplier keeps neighbouring seeds' streams apart) makes the draw resumable.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    lengths = torch.arange(config.num_latents, dtype=torch.float64) / max(1, config.num_latents - 1)
    probabilities = (lengths**config.pareto_alpha).diff()
    count = min(config.num_sampled_prefixes, config.num_latents) - 1
    if count == 0:
        return [config.num_latents]
    # The exponential race draws without replacement at any size; torch.multinomial stops at 2^24 categories.
    keys = torch.empty_like(probabilities).exponential_(generator=generator) / probabilities
    drawn = keys.topk(count, largest=False).indices + 1
    return [*sorted(drawn.tolist()), config.num_latents]


@dataclass(frozen=True)
class Length:
    """How many steps a run has.

    Attributes:
        first: As it was planned at first.
        extensions: (From step, steps in all) each time that was changed.
    """

    first: int
    extensions: tuple[tuple[int, int], ...] = ()

    @property
    def max_steps(self) -> int:
        """Steps of the run as it is now."""
        return self.extensions[-1][1] if self.extensions else self.first

    def to_dict(self) -> dict[str, Any]:
        """As checkpoints record it, JSON-able."""
        return {"first_max_steps": self.first, "extensions": [list(pair) for pair in self.extensions]}
