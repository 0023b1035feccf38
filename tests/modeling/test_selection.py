"""The k largest over several processes, here threads that really wait for each other, against `torch.topk` of all."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_msae.modeling import selection
from hf_msae.modeling.selection import SINGLE_PROCESS, ProcessGroup, among_largest, sum_over
from hf_msae.modeling.sparse_encoder import select_largest, select_largest_per_token
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import HANG_SECONDS
from torch import Tensor

properties = settings(max_examples=30, deadline=None, derandomize=True)


class ThreadRanks(ProcessGroup):
    """One of several threads; every operation waits for all."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.size, self.barrier, self.table = rank, size, barrier, table

    def _all(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.barrier.wait()
        values = list(self.table)
        self.barrier.wait()
        return values

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._all(tensor))

    def sum(self, tensor: Tensor) -> Tensor:
        return self.gather(tensor).sum(0).to(tensor.dtype)

    def minimum(self, tensor: Tensor) -> Tensor:
        return self.gather(tensor).amin(0)

    def total(self, number: int) -> int:
        return sum(self._all(number))


def together(size: int, work: Callable[[ProcessGroup], Any]) -> list[Any]:
    """What `work` gives to each of so many threads."""
    barrier, table = threading.Barrier(size, timeout=HANG_SECONDS), [None] * size
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, size, barrier, table))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(
    rows=st.integers(1, 5),
    widths=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    k=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    counts=st.sampled_from([1, 64, 1 << 18]),
    few=st.sampled_from([("KEYS_OF_A_ROW", 1 << 14), ("KEYS_OF_A_ROW", 0), ("KEYS_SENT", 12)]),
    seed=st.integers(0, 1000),
)
@properties
def test_exactly_the_k_largest_positive_of_each_row(rows, widths, k, dtype, counts, few, seed):
    """bfloat16 has many equal values, and some processes have nothing."""
    parts = [draw(rows, width, seed=seed + i, dtype=dtype) for i, width in enumerate(widths)]
    whole = torch.cat(parts, dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "COUNTS", counts)
        patch.setattr(selection, *few)
        masks = together(len(parts), lambda ranks: among_largest(parts[ranks.rank], k, ranks))
    mask = torch.cat(masks, dim=1)
    assert torch.equal(mask.sum(1), (whole > 0).sum(1).clamp_max(k))
    # The same as a stable sort: of equal values the first.
    order = whole.double().sort(dim=1, descending=True, stable=True).indices[:, :k]
    expected = torch.zeros_like(mask).scatter(1, order, True) & (whole > 0)
    assert torch.equal(mask, expected)


def test_extreme_values_have_their_place():
    tiny, inf = torch.finfo(torch.float32).tiny, float("inf")
    values = torch.tensor([[0.0, -1.0, tiny, inf, float("nan"), 1.0, -inf, 3e38]])
    assert among_largest(values, 2, SINGLE_PROCESS).tolist() == [
        [False, False, False, True, False, False, False, True]
    ]
    assert among_largest(values, 9, SINGLE_PROCESS).tolist() == [[False, False, True, True, False, True, False, True]]


@given(size=st.integers(2, 4), k=st.integers(1, 6), loud=st.sampled_from([1.0, 50.0]), seed=st.integers(0, 500))
@properties
def test_other_tokens_in_every_process(size, k, loud, seed):
    """Also where one process's activations are fifty times those of the others, and the sample tells little."""
    parts = [draw(7, 5, seed=seed + rank) * (loud if rank == 0 else 1.0) for rank in range(size)]
    W_enc, b_enc, count = draw(30, 5, seed=seed + 20), draw(30, seed=seed + 21), k * 7 * size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_msae.modeling.sparse_encoder.SAMPLES", 8)
        found = together(size, lambda ranks: select_largest(parts[ranks.rank], W_enc, b_enc, count, ranks))
    dense = torch.cat([active.to_dense(7, 30) for active in found])
    alone = select_largest(torch.cat(parts), W_enc, b_enc, count).to_dense(7 * size, 30)
    assert (dense > 0).sum() == (alone > 0).sum()
    torch.testing.assert_close(dense, alone)


@given(size=st.integers(2, 4), k=st.integers(1, 6), seed=st.integers(0, 500))
@properties
def test_other_latents_in_every_process(size, k, seed):
    x, W_enc, b_enc = draw(9, 5, seed=seed), draw(31, 5, seed=seed + 1), draw(31, seed=seed + 2)
    bounds = [rank * 31 // size for rank in range(size + 1)]
    for select, count in ((select_largest, k * 9), (select_largest_per_token, k)):

        def mine(ranks, select=select, count=count):
            here = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
            return select(x, W_enc[here], b_enc[here], count, ranks).to_dense(9, here.stop - here.start)

        whole = select(x, W_enc, b_enc, count).to_dense(9, 31)
        torch.testing.assert_close(torch.cat(together(size, mine), dim=1), whole)


def test_a_sum_over_processes_gives_each_its_own_gradient():
    parts = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 5.0], requires_grad=True)]

    def work(ranks):
        total = sum_over(parts[ranks.rank], ranks)
        total.square().sum().backward()
        return total.detach()

    totals = together(2, work)
    assert all(total.tolist() == [4.0, 7.0] for total in totals)
    assert [part.grad.tolist() for part in parts] == [[8.0, 14.0], [8.0, 14.0]]
