# Copyright 2026 The hf_msae authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The k largest of values that lie on several processes, exactly, without bringing the values together.

Where they are few, every process sends its k largest, and each finds the border among them. Where they are many, they
stay where they are: for positive numbers the bit pattern, read as an integer, grows with the value, so the k-th
largest is found digit by digit. Every process counts how many of its own values reach each possible next digit, the
counts are added up, and the largest digit that k values reach is the right one. What travels is a few thousand counts,
whatever the number of values. Both serve one selection over a whole batch (a row) and one for each token (many rows).

`ProcessGroup` is what this needs of a group of processes; alone, each of its operations is the identity. The processes
themselves are the trainer's business (`hf_msae.training.collectives`), so that these files need none.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Up to here, in keys of a row over all processes and in keys of all rows, every process sends its largest keys: one
# message in place of several rounds, each of which waits for the slowest process.
KEYS_OF_A_ROW = 1 << 14
KEYS_SENT = 1 << 24
# Counts that one process sends in a round, over all rows. More digits at once are fewer rounds of more bytes.
COUNTS = 1 << 18
# Bits of a digit: where there is one row, and at least, where there are many.
WIDEST_DIGIT = 11
NARROWEST_DIGIT = 3


class ProcessGroup:
    """Processes that work on one batch or one dictionary together; as this class is, a process by itself.

    Every process of a group must call the same operations in the same order. `sum`, `minimum` and `maximum` may
    overwrite what they are given, and give every process the same bits.
    """

    rank = 0
    size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, of the same shape."""
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to replace a contiguous tensor by the sum over the processes, and give what waits for it."""
        return lambda: None

    def minimum(self, tensor: Tensor) -> Tensor:
        """The smallest over the processes, of the same shape."""
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """The largest over the processes, of the same shape."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Every process's tensor, in their order, (size, *shape)."""
        return tensor.unsqueeze(0)

    def total(self, number: int) -> int:
        """The sum of a number."""
        return number


SINGLE_PROCESS = ProcessGroup()


class SumOverRanks(torch.autograd.Function):
    """The sum of every process's tensor, whose gradient each process takes for its own part.

    Right where all processes go on with the same arithmetic, so that all have the whole gradient of the sum already.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor, ranks: ProcessGroup) -> Tensor:
        """Sum over the processes."""
        return ranks.sum(tensor.clone())

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Pass the gradient on as it is."""
        return grad, None


def sum_over(tensor: Tensor, ranks: ProcessGroup) -> Tensor:
    """The sum of every process's part, with a gradient."""
    return tensor if ranks.size == 1 else SumOverRanks.apply(tensor, ranks)


@torch.no_grad()
def among_largest(values: Tensor, k: int, ranks: ProcessGroup) -> Tensor:
    """Find which values are positive and among the k largest of their row over all processes.

    Of equal values on the border those of the lower rank and the lower place come first, so that there are exactly k
    where there are as many positive ones.

    Args:
        values: Values (rows, n); n may differ between processes.
        k: How many of each row.
        ranks: The processes.

    Returns:
        A mask of the same shape.
    """
    keys = _keys(values)
    sent = k * ranks.size
    find = _border_of_keys if sent <= KEYS_OF_A_ROW and sent * keys.shape[0] <= KEYS_SENT else _border_of_counts
    border, left = find(keys, k, ranks)
    level = (keys == border) & (keys > 0)
    return (keys > border) | (level & (level.cumsum(-1) <= left))


def _keys(values: Tensor) -> Tensor:
    """Give integers in the order of the values, int64 for float64 and int32 for less.

    They are zero for values not above zero, and for NaN.
    """
    wide = values if values.dtype == torch.float64 else values.float()
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    return torch.where(wide > 0, wide, 0).contiguous().view(integer)


def _border_of_keys(keys: Tensor, k: int, ranks: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Find where each row's k largest keys end, from the k largest of every process.

    Args:
        keys: This process's keys (rows, n).
        k: How many of each row.
        ranks: The processes.

    Returns:
        Each row's border (rows, 1), the k-th largest key, zero where there are fewer; and how many of this process's
        keys that equal the border are among the k largest (rows, 1), if it has as many.
    """
    largest = keys.new_zeros(keys.shape[0], k)
    largest[:, : keys.shape[1]] = keys.topk(min(k, keys.shape[1]), dim=-1).values
    everyones = ranks.gather(largest)  # (ranks, rows, k)
    border = everyones.transpose(0, 1).flatten(1).topk(k, dim=-1).values[:, -1:]
    # A process that sent k keys may have more that equal the border, but then it leaves none to later processes.
    above, level = (everyones > border).sum(-1), (everyones == border).sum(-1)  # (ranks, rows)
    return border, (k - above.sum(0) - level[: ranks.rank].sum(0)).unsqueeze(-1)


def _border_of_counts(keys: Tensor, k: int, ranks: ProcessGroup) -> tuple[Tensor, Tensor]:
    """As `_border_of_keys`, from counts, digit by digit: for so many keys that they had better stay where they are."""
    border = _largest_reached(keys, k, ranks)
    counts = ranks.gather(torch.stack([(keys > border).sum(-1), (keys == border).sum(-1)]))  # (ranks, 2, rows)
    return border, (k - counts[:, 0].sum(0) - counts[: ranks.rank, 1].sum(0)).unsqueeze(-1)


def _largest_reached(keys: Tensor, k: int, ranks: ProcessGroup) -> Tensor:
    """The largest number that at least k of each row's keys (rows, n), over all processes, reach: (rows, 1)."""
    rows, num_keys = keys.shape
    bits = torch.iinfo(keys.dtype).bits - 1
    width = max(NARROWEST_DIGIT, min(WIDEST_DIGIT, (COUNTS // max(1, rows)).bit_length() - 1))
    rising = keys.sort(dim=-1).values
    border = keys.new_zeros(rows, 1)
    while bits:
        shift = max(0, bits - width)
        digits = torch.arange(1, 1 << (bits - shift), dtype=keys.dtype, device=keys.device) << shift
        reached = ranks.sum(num_keys - torch.searchsorted(rising, border + digits, out_int32=True))
        border = border + ((reached >= k).sum(-1, keepdim=True).to(keys.dtype) << shift)
        bits = shift
    return border
