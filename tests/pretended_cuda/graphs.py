"""CUDA graphs of the pretended device: a capture records what is asked and undoes it, a replay asks for it again.

On a real GPU a capture computes nothing. Here everything is computed, because what follows needs tensors; when the
capture ends, what was there before has its numbers again, and what was made has numbers that nobody could take for a
result. A replay reads and writes the same memory, as there.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

NONSENSE = 0xFF  # in every byte: NaN for floats, -1 for whole numbers


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]


class PretendedGraph:
    """As `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for call in self._calls:
                call()

    def add(self, call: Callable[[], None]) -> None:
        self._calls.append(call)


class Capture(AbstractContextManager):
    """While this is open, what is asked goes into a graph.

    Args:
        graph: The graph.
        ended: Called when the capture ends.
    """

    def __init__(self, graph: PretendedGraph, ended: Callable[[], None]) -> None:
        self._graph, self._ended = graph, ended
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: dict[int, Tensor] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation of plain tensors, and keep it."""
        arguments = func._schema.arguments
        given_to = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
        written = [value for argument, value in given_to if _is_written(argument)]
        self._keep(_tensors(written))
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        # As they are now: what follows may change a tensor's shape.
        same_args, same_kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        result = func(*args, **kwargs)
        made = [tensor.detach() if _memory(tensor) not in given else None for tensor in _tensors(result)]
        self._made |= {_memory(tensor): tensor for tensor in made if tensor is not None}
        if written or any(tensor is not None for tensor in made):
            self._graph.add(lambda: _run_again(func, same_args, same_kwargs, made))
        return result

    def launch(self, kernel: Callable[[], None], tensors: Iterable[Tensor]) -> None:
        """Launch a kernel that may write any of these tensors, and keep it."""
        self._keep(tensors)
        kernel()
        self._graph.add(kernel)

    def _keep(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if _memory(tensor) not in self._made and _memory(tensor) not in self._before:
                self._before[_memory(tensor)] = (tensor, _bytes(tensor).clone())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended()
        with torch.no_grad():
            for tensor, before in self._before.values():
                _bytes(tensor).copy_(before)
            for tensor in self._made.values():
                _bytes(tensor).fill_(NONSENSE)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _run_again(func: Any, args: Any, kwargs: Any, made: list[Tensor | None]) -> None:
    for old, new in zip(made, _tensors(func(*args, **kwargs)), strict=True):
        if old is not None:
            old.copy_(new)
