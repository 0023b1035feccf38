"""Adam for a dictionary: projection, clipping, the step and renormalisation in as few passes over memory as possible.

Decoder rows have norm 1. What a gradient would change of that norm is taken out before Adam averages it, and the rows
are normalised after the step. Done one after another, these are six passes over the gradients and weights; here they
are two. The first reads the gradients for their norm, which after projection is known without projecting:
‖g - (g·w)w‖² = ‖g‖² - (g·w)² for a row w of norm 1. The second takes some rows at a time through projection, Adam
(which divides the gradient by the clipping factor as it reads it) and normalisation, while they are in the cache.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from hf_msae.modeling.selection import SINGLE_PROCESS, ProcessGroup

# Numbers of a tensor that go through the step together: on the CPU what fits the caches with its gradient and moments.
CPU_CHUNK = 1 << 19


class DictionaryAdam(torch.optim.Adam):
    """`torch.optim.Adam`, fused, with unit rows and clipping built in; its state is Adam's.

    Args:
        groups: parameter groups, as in Adam.
        unit_rows: the parameter (num_latents, hidden_size) whose rows have norm 1 and keep it.
        max_grad_norm: the norm to which all gradients together are clipped; 0 does not clip.
        ranks: the processes that hold other rows of the same parameters.
        shared: those parameters that all of these hold; they count once in the norm.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        unit_rows: Tensor,
        max_grad_norm: float,
        ranks: ProcessGroup = SINGLE_PROCESS,
        shared: Sequence[Tensor] = (),
        **options: Any,
    ) -> None:
        super().__init__(groups, fused=True, **options)
        self._unit_rows, self._max_grad_norm, self._ranks, self._shared = unit_rows, max_grad_norm, ranks, shared

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step with the gradients that are there; they are used up."""
        rows, gradient = self._unit_rows, self._unit_rows.grad
        if gradient is None:
            raise RuntimeError("DictionaryAdam.step needs gradients: call backward() first.")
        radial = torch.einsum("fd,fd->f", gradient, rows)
        clipping = self._clipping(radial)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(parameter, parameter.grad, group, radial, clipping)

    def _clipping(self, radial: Tensor) -> Tensor | None:
        """What gradients are to be divided by, a scalar of at least 1."""
        if not self._max_grad_norm:
            return None
        squares = torch.stack([self._square(p) for g in self.param_groups for p in g["params"] if p.grad is not None])
        norm = self._ranks.sum(squares.sum() - radial.square().sum()).clamp_min(0).sqrt()
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
