"""Optimization: Adam for a dictionary, and what changes from step to step.

Schedules are pure functions of the step, so that a resumed run needs no scheduler state.

An aligned encoder (arXiv:2605.18629) has rows e = d + r - (r·d)d for a decoder row d and a remainder r that is learnt,
so that e·d = 1. What is stored is e. A step subtracts d, which leaves r at right angles to d, changes the gradients of
e and d into those of r and d, and puts e together again from what Adam made of both.

Decoder rows have norm 1. What a gradient would change of that norm is taken out before Adam averages it, and the rows
are normalised after the step. One after another, projection, clipping, step and normalisation are six passes over the
gradients and weights; here they are two. The first reads the gradients for their norm, which after projection is known
without projecting: ‖g - (g·w)w‖² = ‖g‖² - (g·w)² for a row w of norm 1. The second takes some rows at a time through
projection, Adam (which divides the gradient by the clipping factor as it reads it) and normalisation, while they are
in the cache. On a GPU whose kernels work (`modeling/triton_rows.py`), a row of the decoder goes through all of it in
registers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from hf_msae.modeling import MatryoshkaSAEConfig
from hf_msae.modeling.devices import constants, has_kernels
from hf_msae.modeling.selection import SINGLE_PROCESS, ProcessGroup
from hf_msae.training.arguments import SAETrainingArguments

# Numbers of a tensor that go through the step together: on the CPU what fits the caches with its gradient and moments.
CPU_CHUNK = 1 << 19


class DictionaryAdam(torch.optim.Adam):
    """`torch.optim.Adam`, fused, with unit rows and clipping built in; its state is Adam's.

    Args:
        groups: Parameter groups, as in Adam.
        unit_rows: The parameter (num_latents, hidden_size) whose rows have norm 1 and keep it.
        max_grad_norm: The norm to which all gradients together are clipped; 0 does not clip.
        ranks: The processes that hold other rows of the same parameters.
        shared: Those parameters that all of these hold; they count once in the norm.
        aligned_rows: The parameter (num_latents, hidden_size) whose rows are to have inner product 1 with the unit
            rows, and have it already.
        **options: As in Adam.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        unit_rows: Tensor,
        max_grad_norm: float,
        ranks: ProcessGroup = SINGLE_PROCESS,
        shared: Sequence[Tensor] = (),
        aligned_rows: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(groups, fused=True, **options)
        self._unit_rows, self._max_grad_norm, self._ranks, self._shared = unit_rows, max_grad_norm, ranks, shared
        self._aligned_rows = aligned_rows

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients that are there; they are used up.

        Args:
            closure: Not used.
        """
        rows, gradient = self._unit_rows, self._unit_rows.grad
        if gradient is None:
            raise RuntimeError("DictionaryAdam.step needs gradients: call backward() first.")
        if self._aligned_rows is not None:
            self._take_remainders(self._aligned_rows, rows, gradient)
        radial, squares = self._row_products(gradient, rows)
        clipping = self._clipping(radial, squares)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(parameter, parameter.grad, group, radial, clipping)
        if self._aligned_rows is not None:
            self._aligned_rows.add_(rows)
            align_rows(self._aligned_rows, rows)

    @staticmethod
    def _take_remainders(encoder: Tensor, rows: Tensor, gradient: Tensor) -> None:
        """Leave of the encoder its remainder, and make the gradients those of the remainder and of the rows.

        With e = d + r - (r·d)d and r·d = 0, a gradient g of e is g - (g·d)d for r and adds g - (g·d)r to that of d.
        """
        if encoder.grad is None:
            raise RuntimeError("DictionaryAdam.step needs gradients: call backward() first.")
        encoder.sub_(rows)
        along = torch.einsum("fd,fd->f", encoder.grad, rows)[:, None]
        gradient.add_(encoder.grad).addcmul_(along, encoder, value=-1)
        encoder.grad.addcmul_(along, rows, value=-1)

    @staticmethod
    def _row_products(gradient: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inner products of a gradient's rows with these, (num_latents,), and their squared norms, or None."""
        if has_kernels(rows):
            from hf_msae.modeling.triton_rows import row_products

            squares, products = row_products(gradient, rows)
            return products, squares
        return torch.einsum("fd,fd->f", gradient, rows), None

    def _clipping(self, radial: Tensor, squares: Tensor | None) -> Tensor | None:
        """What gradients are to be divided by, a scalar of at least 1."""
        if not self._max_grad_norm:
            return None
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        known = {id(self._unit_rows): squares.sum()} if squares is not None else {}
        norms = torch.stack([known[id(p)] if id(p) in known else self._square(p) for p in parameters])
        norm = self._ranks.sum(norms.sum() - radial.square().sum()).clamp_min(0).sqrt()
        return (norm / self._max_grad_norm).clamp_min(1)

    def _square(self, parameter: Tensor) -> Tensor:
        """Squared norm of a gradient, or this process's part of it where others have the same one."""
        square = torch.linalg.vector_norm(parameter.grad).square()
        return square / self._ranks.size if any(parameter is shared for shared in self._shared) else square

    def _step_parameter(
        self, parameter: Tensor, grad: Tensor, group: dict[str, Any], radial: Tensor, clipping: Tensor | None
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        whole = (parameter, grad, state["exp_avg"], state["exp_avg_sq"])
        if parameter is self._unit_rows and has_kernels(parameter):
            self._step_rows(whole, state["step"], group, radial, clipping)
            return
        size = parameter.shape[0]
        if parameter.device.type == "cpu":
            size = max(1, CPU_CHUNK * parameter.shape[0] // max(1, parameter.numel()))
        for start in range(0, parameter.shape[0], size):
            weights, gradient, average, square = (tensor[start : start + size] for tensor in whole)
            if parameter is self._unit_rows:
                gradient.addcmul_(radial[start : start + size, None], weights, value=-1)
            adam(
                [weights],
                [gradient],
                [average],
                [square],
                [],
                [state["step"].clone()],  # the function counts this one up
                fused=True,
                grad_scale=clipping,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )
            if parameter is self._unit_rows:
                weights.div_(torch.linalg.vector_norm(weights, dim=-1, keepdim=True))
        state["step"] += 1

    @staticmethod
    def _step_rows(
        whole: Sequence[Tensor], step: Tensor, group: dict[str, Any], radial: Tensor, clipping: Tensor | None
    ) -> None:
        """The same for the unit rows, in one pass."""
        from hf_msae.modeling.triton_rows import adam_rows

        step += 1
        betas = constants(group["betas"], step.new_empty((), dtype=torch.float64))
        adam_rows(
            *whole,
            radial=radial,
            divisor=torch.ones_like(step) if clipping is None else clipping,
            corrections=(1 - betas**step).float(),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
        )


@torch.no_grad()
def align_rows(encoder: Tensor, rows: Tensor) -> None:
    """Bring the inner product of each encoder row with its decoder row to 1, along the decoder row.

    Args:
        encoder: (num_latents, hidden_size), which is changed.
        rows: Of norm 1, of the same shape.
    """
    missing = 1 - torch.einsum("fd,fd->f", encoder, rows)
    encoder.addcmul_(missing[:, None], rows)


# What changes from step to step


def _steps(value: float, max_steps: int, share_up_to: float) -> float:
    """A number of steps, or a share of all of them."""
    return value * max_steps if value <= share_up_to else value


def default_learning_rate(num_latents: int, max_steps: int) -> float:
    """Compute the peak learning rate that is used when none is given.

    It is 0.01 for 1,024 latents and 730 steps, where it was found by a sweep.

    It falls with the square root of the width (arXiv:2406.04093 finds about that power) and with the fourth root of
    the length of the run, which leads from that sweep to the 3e-4 that 2503.17547 uses for 65,536 latents and 244,000
    steps.

    Args:
        num_latents: Width of the dictionary.
        max_steps: Length of the run.

    Returns:
        The learning rate.
    """
    return 1e-2 * math.sqrt(1024 / num_latents) * (730 / max(730, max_steps)) ** 0.25


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
