"""Triton's interpreter for pretended tensors: it asks a tensor for its memory, which only the CPU's have."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

from torch import Tensor

from pretended_cuda.device import PretendedCuda, PretendedTensor


class _Kernel:
    """A kernel that is launched as any, with the CPU tensors inside of the pretended ones."""

    def __init__(self, name: str, kernel: Any, device: PretendedCuda) -> None:
        self.name, self.kernel, self.device = name, kernel, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As other kernels call it, from within."""
        return self.kernel(*args, **kwargs)

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.device.operations[f"triton.{self.name}"] += 1
            plain = [argument.held if isinstance(argument, PretendedTensor) else argument for argument in args]
            if self.device.capture is None:
                self.kernel[grid](*plain, **kwargs)
                return
            tensors = [argument for argument in plain if isinstance(argument, Tensor)]
            self.device.capture.launch(lambda: self.kernel[grid](*plain, **kwargs), tensors)

        return launch


@contextmanager
def interpreted_kernels(module: ModuleType, device: PretendedCuda) -> Iterator[None]:
    """Launch the kernels of a module, imported with `TRITON_INTERPRET=1`, on pretended tensors.

    Args:
        module: Such as `hf_msae.modeling.triton_ops`.
        device: What `pretended_cuda` gave.
    """
    from triton.runtime.interpreter import InterpretedFunction

    with ExitStack() as stack:
        for name, value in vars(module).copy().items():
            if isinstance(value, InterpretedFunction):
                stack.enter_context(mock.patch.object(module, name, _Kernel(name, value, device)))
        yield
