"""What changes from step to step, each as a pure function of the step, so that a resumed run needs no scheduler
state.
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


def default_learning_rate(num_latents: int, max_steps: int) -> float:
    """The peak learning rate when none is given: 0.01 for 1,024 latents and 730 steps, where it was found by a sweep.

    It falls with the square root of the width (arXiv:2406.04093 finds about that power) and with the fourth root of
    the length of the run, which leads from that sweep to the 3e-4 that 2503.17547 uses for 65,536 latents and 244,000
    steps.
    """
    return 1e-2 * math.sqrt(1024 / num_latents) * (730 / max(730, max_steps)) ** 0.25


def learning_rate_factor(
    step: int, max_steps: int, args: SAETrainingArguments, extensions: Sequence[tuple[int, int]] = ()
) -> float:
    """Share of the peak learning rate at a step (from 0): linear warm-up, constant, decay to zero.

    `extensions` are (from step, steps in all) each time the run was given another length. The schedule is then that of
    the new length, but the rate rises to it from where it was, over the warm-up of the steps that are left.
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
    """Active latents per token at a step: falls linearly from `k_initial` to `config.k` (as in sparsify)."""
    steps = _steps(args.k_anneal_steps, max_steps, share_up_to=1 - 1e-9)
    if step >= steps:
        return config.k
    initial = args.k_initial if args.k_initial is not None else min(8 * config.k, config.num_latents / 4)
    return config.k + (max(initial, config.k) - config.k) * (1 - step / steps)


def sample_prefix_sizes(step: int, config: MatryoshkaSAEConfig, seed: int) -> list[int]:
    """This step's levels: sizes drawn without replacement, small ones more often, and the whole dictionary.

    P(l) ∝ (l/L)^α - ((l-1)/L)^α for l = 1 … L = num_latents - 1, a truncated Pareto law of density l^(α-1) (Nabeshima,
    "Matryoshka Sparse Autoencoders", 2024).
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
    """Steps of a run as they were planned at first, and (from step, steps in all) each time that was changed."""

    first: int
    extensions: tuple[tuple[int, int], ...] = ()

    @property
    def max_steps(self) -> int:
        return self.extensions[-1][1] if self.extensions else self.first

    def to_dict(self) -> dict[str, Any]:
        return {"first_max_steps": self.first, "extensions": [list(pair) for pair in self.extensions]}
