"""What the processes of a run say to each other, in one place, where it is counted.

Everything that a step needs of other processes goes through `TorchProcessGroup`: sums, minima, and pieces brought
together. So what travels is counted in one place (`benchmarks/communication.py` reads it), and the arithmetic above it
does not know by what it travels: gloo on the CPU, NCCL on GPUs.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from hf_msae.modeling.selection import SINGLE_PROCESS, ProcessGroup

# Numbers that travel together when gradients are summed: smaller ones are packed into one message of this size.
PACK = 1 << 20
# Bytes of a piece on its way to the process that writes a checkpoint, which so needs no more memory than this.
PIECE_BYTES = 1 << 28


class TorchProcessGroup(ProcessGroup):
    """All processes of the run, by torch.distributed.

    Args:
        device: Where tensors must lie to travel.

    Attributes:
        calls: How often each operation was called.
        bytes: Bytes of the tensors that this process gave to each operation. What a network carries depends on the
            algorithm that it chooses: about twice that for sums in a ring.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def _count(self, operation: str, tensor: Tensor) -> None:
        self.calls[operation] += 1
        self.bytes[operation] += tensor.numel() * tensor.element_size()

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        tensor = tensor.contiguous()
        self._count("reduce", tensor)
        dist.all_reduce(tensor, operation)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, of the same shape; `tensor` may be overwritten."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to replace a contiguous tensor by the sum over the processes, and give what waits for it."""
        self._count("reduce", tensor)
        return dist.all_reduce(tensor, async_op=True).wait

    def minimum(self, tensor: Tensor) -> Tensor:
        """The smallest over the processes, of the same shape; `tensor` may be overwritten."""
        return self._reduce(tensor, dist.ReduceOp.MIN)

    def maximum(self, tensor: Tensor) -> Tensor:
        """The largest over the processes, of the same shape; `tensor` may be overwritten."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def gather(self, tensor: Tensor) -> Tensor:
        """Every process's tensor, in their order, (size, *shape)."""
        tensor = tensor.contiguous()
        self._count("gather", tensor)
        gathered = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(gathered.unbind()), tensor)
        return gathered

    def total(self, number: int) -> int:
        """The sum of a number over the processes."""
        return int(self.sum(torch.tensor(number, dtype=torch.int64, device=self.device)))

    def pieces(self, rows: Tensor) -> Iterator[Tensor]:
        """Bring the rows of all processes to the first one, a piece at a time; it must take all pieces.

        Args:
            rows: This process's rows, (n, ...).

        Yields:
            On rank 0, every process's rows in their order; elsewhere nothing, once this process's rows are sent.
        """
        size = _rows_per_piece(rows)
        numbers = self.gather(torch.tensor(rows.shape[0], device=self.device)).tolist()
        if self.rank:
            for piece in rows.split(size):
                self._count("send", piece)
                dist.send(piece.contiguous(), dst=0)
            return
        yield from rows.split(size)
        for source, number in enumerate(numbers[1:], start=1):
            for begin in range(0, number, size):
                piece = rows.new_empty(min(size, number - begin), *rows.shape[1:])
                dist.recv(piece, src=source)
                yield piece


def process_group(accelerator: Accelerator) -> ProcessGroup:
    """The processes of a run; for one alone, the group whose operations are the identity."""
    return TorchProcessGroup(accelerator.device) if accelerator.num_processes > 1 else SINGLE_PROCESS


def row_pieces(rows: Tensor, ranks: ProcessGroup) -> Iterator[Tensor]:
    """As `TorchProcessGroup.pieces`, also of a process by itself.

    Args:
        rows: This process's rows, (n, ...).
        ranks: The processes.

    Returns:
        Every process's rows, a piece at a time, on the first one.
    """
    return ranks.pieces(rows) if isinstance(ranks, TorchProcessGroup) else iter(rows.split(_rows_per_piece(rows)))


def _rows_per_piece(rows: Tensor) -> int:
    """Rows in a piece; the same in every process, whose rows differ only in number."""
    return max(1, PIECE_BYTES // max(1, rows[:1].numel() * rows.element_size()))


class GradientSums:
    """Replaces each gradient of a step by the sum over the processes: large ones where they lie, small ones packed.

    A step's last backward pass may begin with them: a large gradient then travels as soon as it is whole, while those
    behind it are computed. The decoder's is whole before the encoder's is begun, on every path of the loss, so that
    all processes send them in the same order.

    Args:
        parameters: Those that will have gradients, in the same order in every process.
        ranks: The processes.
    """

    def __init__(self, parameters: Iterable[Tensor], ranks: ProcessGroup) -> None:
        self.parameters, self.ranks = list(parameters), ranks
        self._begun: dict[Tensor, Callable[[], None]] = {}

    @contextmanager
    def begun_early(self) -> Iterator[None]:
        """Within it is the backward pass after which no gradient changes."""
        with ExitStack() as stack:
            for parameter in self.parameters if self.ranks.size > 1 else ():
                if parameter.numel() >= PACK:
                    stack.callback(parameter.register_post_accumulate_grad_hook(self._begin).remove)
            yield

    def _begin(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._begun[parameter] = self.ranks.begin_sum(parameter.grad)

    @torch.no_grad()
    def finish(self) -> None:
        """Sum those that are not begun, and wait for all; nothing in a process by itself."""
        if self.ranks.size == 1:
            return
        small: list[Tensor] = []
        for parameter in self.parameters:
            if parameter.grad is None:
                raise RuntimeError("GradientSums.finish needs every parameter's gradient: call backward() first.")
            if parameter.grad.numel() < PACK:
                small.append(parameter.grad)
            elif parameter not in self._begun:
                self._begin(parameter)
        if small:
            packed = self.ranks.sum(torch.cat([gradient.flatten() for gradient in small]))
            for gradient, part in zip(small, packed.split([gradient.numel() for gradient in small]), strict=True):
                gradient.copy_(part.view_as(gradient))
        for wait in self._begun.values():
            wait()
        self._begun.clear()


Job = Callable[[Path | None], None]


class MainProcessWriter:
    """Lets the main process write files for which the others must send what they hold, whatever goes wrong on the way.

    Within the context only the main process does anything: it calls `write` for the jobs it wants, in its own order.
    On leaving it, the others do what the main one asks for, until it leaves as well, be it by an error.

    Args:
        ranks: The processes that hold parts of what is written.
        jobs: What there is to write, by name. Every process calls a job at the same time: the main one with the path
            to write, the others with None, to send.
    """

    def __init__(self, ranks: ProcessGroup, jobs: Mapping[tuple[str, str], Job]) -> None:
        self.ranks, self.jobs, self._names = ranks, jobs, list(jobs)

    def write(self, name: tuple[str, str], path: Path) -> None:
        """Write a job's file or folder; called by the main process alone.

        Args:
            name: Of the job.
            path: What it writes.
        """
        self.ranks.total(1 + self._names.index(name))
        self.jobs[name](path)

    def __enter__(self) -> "MainProcessWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.ranks.rank == 0:
            self.ranks.total(0)
            return
        while asked := self.ranks.total(0):
            self.jobs[self._names[asked - 1]](None)
