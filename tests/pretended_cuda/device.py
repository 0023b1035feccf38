"""The pretended tensors, and the mode that watches what is done with them."""

import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from hf_msae.modeling import devices
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from pretended_cuda.graphs import Capture, PretendedGraph

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
MEMORY = 80 * 2**30
HERE = Path(__file__).parent
LIBRARIES = (str(Path(torch.__file__).parent), str(HERE), str(Path(traceback.__file__).parent) + "/contextlib")

# What waits for the device whatever it is given: numbers read from it, and sizes that depend on data.
SYNCING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.bincount,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.histc,
    aten.equal,
}
# What adds floats by atomic operations, or refuses `torch.use_deterministic_algorithms` on CUDA. `index_put_` that
# accumulates is not among these: CUDA sorts its places first.
ATOMIC = {
    aten.index_add,
    aten.index_add_,
    aten.scatter_add,
    aten.scatter_add_,
    aten.scatter_reduce,
    aten.scatter_reduce_,
    aten.index_reduce,
    aten.index_reduce_,
    aten.put_,
    aten.embedding_dense_backward,
    aten._embedding_bag_dense_backward,
    aten.kthvalue,
    aten.histc,
    aten.cumsum,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
# What only takes memory, for which nothing is launched.
ALLOCATING = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
COPYING = {aten._to_copy, aten.copy_, aten.copy}
# Beside what is computed number by number, these too take a number of the CPU, which travels with the launch.
TAKES_NUMBERS = {aten.fill_, aten.fill, aten.masked_fill, aten.masked_fill_, aten.where, aten.lift_fresh}


class MixedDevices(RuntimeError):
    """One operation was given tensors of the CPU and of the pretended device."""


class Event(NamedTuple):
    """An operation, and the line outside of torch that asked for it."""

    operation: str
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.operation} at {self.file}:{self.line} in {self.function}"


class PretendedTensor(Tensor):
    """A CPU tensor, `held`, that says it is on `cuda:0`."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "PretendedTensor":
        with torch.inference_mode(False):  # or a view of an ordinary tensor could not be one
            return torch.Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                layout=held.layout,
                device=CPU,
            )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called on a pretended tensor outside of pretended_cuda().")

    # What C++ would answer as for a CPU tensor.
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        if args and args[0] == "cuda":
            args = (DEVICE, *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        dtype, device = dtype or self.dtype, device or DEVICE
        if device.type == DEVICE.type and dtype == self.dtype and not copy:
            return self
        if device.type == DEVICE.type:
            return aten._to_copy(self, dtype=dtype)
        there = torch.empty(self.shape, dtype=dtype)
        # As torch does it: what need not wait arrives in pinned memory.
        return (there.pin_memory() if non_blocking else there).copy_(self, non_blocking=non_blocking)

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Tensor:
        return _made(data, dtype or self.dtype, device or DEVICE, **options)

    def __repr__(self, **kwargs: Any) -> str:
        return f"PretendedTensor({self.held!r})"


class PretendedCuda(TorchDispatchMode):
    """Runs what is done with pretended tensors on the CPU, and records it.

    Attributes:
        syncs: What waited for the device.
        nondeterministic: What gives other bits on another run.
        operations: How often each operation was asked of the device; what only takes memory is not among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[Event] = []
        self.nondeterministic: list[Event] = []
        self.operations: Counter[str] = Counter()
        self.capture: Capture | None = None
        self._pinned: dict[int, Tensor] = {}

    def capture_into(self, graph: PretendedGraph) -> Capture:
        """As `torch.cuda.graph`."""

        def end() -> None:
            self.capture = None

        self.capture = Capture(graph, end)
        return self.capture

    def clear(self) -> None:
        """Forget what was recorded."""
        self.syncs, self.nondeterministic, self.operations = [], [], Counter()

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether `pin_memory` made this tensor or what it is a part of."""
        return tensor.untyped_storage().data_ptr() in self._pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            # There, operations that are made of others arrive whole.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func.overloadpacket in (aten.pin_memory, aten._pin_memory):
            return self._pin(args[0])
        if func.overloadpacket is aten.is_pinned:
            return self.is_pinned(args[0])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        own = [tensor for tensor in tensors if isinstance(tensor, PretendedTensor)]
        asked = kwargs.get("device")
        # C++ means its own device where it passes one on; what leaves the pretended one is copied (`to`).
        target = DEVICE if own else torch.device(asked or CPU)
        if not own and target.type != DEVICE.type:
            return func(*args, **kwargs)
        self._check_devices(func, args, kwargs, tensors)
        self._record(func, args, kwargs, tensors, target)
        plain_args, plain_kwargs = tree_map_only(PretendedTensor, lambda tensor: tensor.held, (args, kwargs))
        if asked is not None:
            plain_kwargs["device"] = CPU
        if self.capture is None:
            result = func(*plain_args, **plain_kwargs)
        else:
            result = self.capture.run(func, plain_args, plain_kwargs)
        if not (func.overloadpacket in COPYING and isinstance(result, Tensor) and result is args[0]):
            result = tree_map_only(Tensor, PretendedTensor, result)
        if not own:
            return result
        return return_and_correct_aliasing(func, args, kwargs, result)

    def _pin(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self._pinned[copy.untyped_storage().data_ptr()] = copy  # kept, so that no other gets its place in memory
        return copy

    def _check_devices(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        """Raises `MixedDevices` for what CUDA refuses."""
        packet = func.overloadpacket
        others = [tensor for tensor in tensors if not isinstance(tensor, PretendedTensor)]
        if packet in COPYING or not others:
            return
        if packet in INDEXING:
            # Indices may come from the CPU (and then wait); values only as one number.
            others = [tensor for tensor in (args[0], *args[2:3]) if isinstance(tensor, Tensor)]
            others = [tensor for tensor in others if not isinstance(tensor, PretendedTensor)]
        numbers = torch.Tag.pointwise in func.tags or packet in TAKES_NUMBERS or packet in INDEXING
        if (numbers and isinstance(args[0], PretendedTensor | float | int)) or packet is aten.where:
            others = [tensor for tensor in others if tensor.dim()]
        if others:
            devices = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
            raise MixedDevices(f"{func} was given {devices}; called {_caller(str(func))}")

    def _record(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], target: torch.device) -> None:
        packet = func.overloadpacket
        if not func.is_view and packet not in ALLOCATING:
            self.operations[str(packet)] += 1
        if packet in SYNCING or self._waits(func, args, kwargs, tensors, target):
            self.syncs.append(_caller(str(packet)))
        moves = packet in COPYING and any(not isinstance(tensor, PretendedTensor) for tensor in tensors)
        if self.capture is not None and (moves or packet in SYNCING):
            raise RuntimeError(f"operation not permitted when stream is capturing: {_caller(str(packet))}")
        if packet in ATOMIC and isinstance(args[0], Tensor) and args[0].is_floating_point():
            self.nondeterministic.append(_caller(str(packet)))

    def _waits(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], target: torch.device) -> bool:
        packet = func.overloadpacket
        if packet in COPYING:
            source, to_device = (args[0], target) if packet is aten._to_copy else (args[1], args[0].device)
            if source.device.type == to_device.type:
                return False
            host = source if source.device == CPU else args[0]
            return not (kwargs.get("non_blocking", len(args) > 2 and args[2]) and self.is_pinned(host))
        if packet in INDEXING:
            indices = [index for index in args[1] if index is not None]
            # One number to where a mask is true is a fill, for which nobody counts.
            fills = packet is not aten.index and not isinstance(args[2], PretendedTensor) and args[2].numel() == 1
            masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            return (masks and not fills) or any(not isinstance(index, PretendedTensor) for index in indices)
        if packet is aten.isin and all(isinstance(given, Tensor) for given in args[:2]):
            # A few are compared with all; more are sorted with them, each once, and how many those are must be known.
            return args[1].numel() >= int(10 * args[0].numel() ** 0.145)
        # Without `output_size` the number of rows must be known first.
        return packet is aten.repeat_interleave and kwargs.get("output_size") is None


def _caller(operation: str) -> Event:
    """The innermost line that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return Event(operation.removeprefix("aten."), path.name, frame.f_lineno, frame.f_code.co_name)


class _Stream:
    """A stream on which nothing runs apart."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: "_Stream") -> None: ...

    def synchronize(self) -> None: ...


def _grouped(tensor_lists: Any, with_indices: bool = False) -> Any:
    """As torch's own groups an optimizer's tensors, under the device that they claim."""
    (found,) = _group(tensor_lists, with_indices).items()
    (_, dtype), values = found
    return {(tensor_lists[0][0].device, dtype): values}


_group = torch.optim.Optimizer._group_tensors_by_device_and_dtype
_tensor, _autocast, _autocast_dtype, _is_autocast = (
    torch.tensor,
    torch.autocast,
    torch.get_autocast_dtype,
    torch.is_autocast_enabled,
)


class _Autocast(_autocast):
    """Autocast of the CPU for what says it is elsewhere."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


def _made(data: Any, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Tensor:
    """`torch.tensor`, in two steps, as C++ does it where no mode can watch: on the CPU, and from there."""
    made = _tensor(data, dtype=dtype, **options)
    return made if device is None or torch.device(device) == CPU else made.to(DEVICE)


def _taken(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """`torch.as_tensor`."""
    return data.to(device, dtype or data.dtype) if isinstance(data, Tensor) else _made(data, dtype, device)


def _cpu_for_cuda(function: Any) -> Any:
    return lambda *args: function(*["cpu" if argument == DEVICE.type else argument for argument in args])


@contextmanager
def pretended_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[PretendedCuda]:
    """A pretended GPU, for as long as this is open.

    Args:
        capability: Its generation; bfloat16 came with (8, 0).

    Yields:
        What it records.
    """
    device = PretendedCuda()
    patches = {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda._exchange_device": lambda index: index,
        "torch.cuda._maybe_exchange_device": lambda index: index,
        "torch.cuda.is_bf16_supported": lambda *args, **kwargs: capability >= (8, 0),
        "torch.cuda.get_device_capability": lambda *args: capability,
        "torch.cuda.get_device_name": lambda *args: "a pretended GPU",
        "torch.cuda.mem_get_info": lambda *args: (MEMORY, MEMORY),
        "torch.cuda.memory_reserved": lambda *args: 0,
        "torch.cuda.memory_allocated": lambda *args: 0,
        "torch.cuda.synchronize": lambda *args: None,
        "torch.cuda.Stream": _Stream,
        "torch.cuda.current_stream": lambda *args: _Stream(),
        "torch.cuda.stream": lambda stream: nullcontext(),
        "torch.optim.Optimizer._group_tensors_by_device_and_dtype": staticmethod(_grouped),
        "torch.__future__._overwrite_module_params_on_conversion": True,
        "torch.tensor": _made,
        "torch.as_tensor": _taken,
        "torch.autocast": _Autocast,
        "torch.get_autocast_dtype": _cpu_for_cuda(_autocast_dtype),
        "torch.is_autocast_enabled": _cpu_for_cuda(_is_autocast),
        "torch.cuda.CUDAGraph": PretendedGraph,
        "torch.cuda.graph": lambda graph, **options: device.capture_into(graph),
        "torch.cuda.graph_pool_handle": lambda: (0, 1),
    }
    with ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value))
        # What is kept there must not outlive the device, nor come from a real one.
        devices._kept_constants.cache_clear()
        stack.callback(devices._kept_constants.cache_clear)
        stack.enter_context(device)
        yield device
