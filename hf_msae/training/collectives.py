"""What the processes of a run say to each other, in one place, where it is counted.

Everything that a step needs of other processes goes through `ProcessRanks`: sums, minima, and pieces brought together.
So there is one list of what travels (`traffic`, read by `benchmarks/communication.py`), and the arithmetic above it
does not know by what it travels: gloo on the CPU, NCCL on GPUs.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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


class ProcessRanks(ProcessGroup):
    """All processes of the run, by torch.distributed.

    Attributes:
        device: where tensors must lie to travel.
        calls, bytes: how often each operation was called, and the bytes of the tensors that this process gave to it
            (what a network carries depends on the algorithm that it chooses: about twice that for sums in a ring).
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
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def minimum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.MIN)

    def maximum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def gather(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self._count("gather", tensor)
        gathered = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(gathered.unbind()), tensor)
        return gathered

    def total(self, number: int) -> int:
        return int(self.sum(torch.tensor(number, dtype=torch.int64, device=self.device)))

    def pieces(self, rows: Tensor) -> Iterator[Tensor]:
        """On rank 0, every process's rows (n, ...), in their order and a piece at a time; elsewhere nothing, once this
        process's rows are sent. Rank 0 must take all pieces.
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


def ranks_of(accelerator: Accelerator) -> ProcessGroup:
    """The processes of a run."""
    return ProcessRanks(accelerator.device) if accelerator.num_processes > 1 else SINGLE_PROCESS


def row_pieces(rows: Tensor, ranks: ProcessGroup) -> Iterator[Tensor]:
    """`ProcessRanks.pieces`, also of a process by itself."""
    return ranks.pieces(rows) if isinstance(ranks, ProcessRanks) else iter(rows.split(_rows_per_piece(rows)))


def _rows_per_piece(rows: Tensor) -> int:
    """Rows in a piece; the same in every process, whose rows differ only in number."""
    return max(1, PIECE_BYTES // max(1, rows[:1].numel() * rows.element_size()))


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor], ranks: ProcessGroup) -> None:
    """Replace each gradient by the sum over the processes: large ones where they lie, small ones in one message."""
    if ranks.size == 1:
        return
    small: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            raise RuntimeError("sum_gradients needs every parameter's gradient: call backward() first.")
        if parameter.grad.numel() < PACK:
            small.append(parameter.grad)
        else:
            ranks.sum(parameter.grad)
    if small:
        packed = ranks.sum(torch.cat([gradient.flatten() for gradient in small]))
        for gradient, part in zip(small, packed.split([gradient.numel() for gradient in small]), strict=True):
            gradient.copy_(part.view_as(gradient))


class OneWriter:
    """Lets the main process write files for which the others must send what they hold, whatever goes wrong on the way.

    Args:
        ranks: the processes.
        jobs: what there is to write. Every process calls a job at the same time: the main one with the path to write,
            the others with None, to send.

    Within the context only the main process does anything: it calls `run` for the jobs it wants, in its own order. On
    leaving it, the others do what the main one asks for, until it leaves as well, be it by an error.
    """

    def __init__(self, ranks: ProcessGroup, jobs: Sequence[Callable[[Path | None], None]]) -> None:
        self.ranks, self.jobs = ranks, jobs

    def run(self, number: int, path: Path) -> None:
        """On the main process: have a job written to `path`."""
        self.ranks.total(number + 1)
        self.jobs[number](path)

    def __enter__(self) -> "OneWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.ranks.rank == 0:
            self.ranks.total(0)
            return
        while asked := self.ranks.total(0):
            self.jobs[asked - 1](None)
