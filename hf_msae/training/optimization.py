"""Optimization: Adam for a dictionary, and the rates with which its parameters learn.

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
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from hf_msae.modeling import MatryoshkaSAE
from hf_msae.modeling.devices import constants, has_kernels
from hf_msae.modeling.selection import SINGLE_PROCESS, ProcessGroup
from hf_msae.modeling.untrusted import PER_LATENT
from hf_msae.training.arguments import SAETrainingArguments

# Numbers of a tensor that go through the step together: on the CPU what fits the caches with its gradient and moments.
CPU_CHUNK = 1 << 19
# The rate of a tokenized SAE's vectors, beside that of biases. Each is moved by its own token alone; on a story model,
# 300 steps, twice the rate gave .004 more FVE, and four times no more than that and lower cross-entropy recovered.
TOKEN_RATE = 2.0


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


def make_optimizer(
    sae: MatryoshkaSAE, args: SAETrainingArguments, learning_rate: float, variance: float, gain: float = 1.0
) -> DictionaryAdam:
    """Make an SAE's optimizer, whose groups have a peak rate for what has no unit and for what is in activations'.

    Args:
        sae: The SAE.
        args: How to train.
        learning_rate: The peak, of what has no unit.
        variance: Total variance of what is reconstructed.
        gain: Of a transcoder, what one unit of what it reads is in units of what it writes.

    Returns:
        The optimizer; each group has its rate as `peak_lr`.
    """
    scale = math.sqrt(variance / sae.config.output_size)
    in_activation_units = [sae.b_enc, sae.b_dec]
    if sae.config.activation == "jumprelu":
        in_activation_units.append(sae.threshold)
    groups = [
        {"params": [sae.W_enc, sae.W_dec], "peak_lr": learning_rate},
        {"params": in_activation_units, "peak_lr": learning_rate * scale},
    ]
    if sae.W_token is not None:
        groups.append({"params": [sae.W_token], "peak_lr": TOKEN_RATE * learning_rate * scale})
    if sae.config.is_transcoder:
        groups[0]["params"] = [sae.W_dec]
        from_input = [sae.W_enc, *([] if sae.W_skip is None else [sae.W_skip])]
        groups.append({"params": from_input, "peak_lr": learning_rate * gain})
    return DictionaryAdam(
        groups,
        sae.W_dec,
        args.max_grad_norm,
        sae.ranks,
        [parameter for name, parameter in sae.named_parameters() if name not in PER_LATENT],
        sae.W_enc if sae.config.aligned else None,
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )
