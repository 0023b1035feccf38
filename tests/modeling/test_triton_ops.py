"""The GPU kernels against torch, on a GPU and in Triton's interpreter, and compiled for GPUs that need not be there.

The checks run in this process where there is a GPU. Without one, and with one too, they run in Triton's interpreter,
which must be asked for before anything imports triton, hence in a process of their own: `test_in_the_interpreter`.
"""

import importlib
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import hf_msae.modeling
import pytest
import torch
from compiled_kernels import WIDE_LOAD, compiled
from hf_msae.modeling import sparse_encoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import HANG_SECONDS
from tied_selection import TIES, check_ties
from torch import Tensor
from torch.nn.functional import embedding_bag
from transformers.dynamic_module_utils import get_imports, get_relative_imports

pytestmark = pytest.mark.slow

SOURCE = Path(hf_msae.modeling.__file__).parent / "triton_ops.py"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (`pip install triton`)")
# The fixtures that shrink blocks hold for all examples of a property, which is what is wanted.
properties = settings(
    max_examples=12 if INTERPRETED else 25,  # the interpreter is slow
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
seeds = st.integers(0, 10_000)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(scope="module")
def triton_ops() -> ModuleType:
    return importlib.import_module("hf_msae.modeling.triton_ops")


@pytest.fixture
def ops(triton_ops: ModuleType) -> ModuleType:
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("runs here in Triton's interpreter only (see test_in_the_interpreter), and on CUDA where it is")
    return triton_ops


@pytest.fixture
def small_blocks(ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Blocks so small that a few places meet every border between them."""
    for name, size in {
        "COLUMNS": 4,
        "ROWS": 2,
        "PLACES": 2,
        "SPLIT": 4,
        "BLOCK": 64,
        "CANDIDATES": 8,
        "SPANS": 4,
    }.items():
        monkeypatch.setattr(ops, name, size)
    return ops


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def integers(high: int, count: int, seed: int) -> Tensor:
    return torch.randint(high, (count,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def segments(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Where segments of these lengths begin, (S,), and the segment of each place, (n,)."""
    sizes = torch.tensor(lengths, dtype=torch.int64)
    return (sizes.cumsum(0) - sizes).to(DEVICE), torch.arange(len(lengths)).repeat_interleave(sizes).to(DEVICE)


def check_segments(ops: ModuleType, lengths: list[int], hidden_size: int, dtype: torch.dtype, seed: int) -> None:
    """`segment_sum` is torch's embedding_bag in float64, and `segment_dot` its gradient for the weights."""
    offsets, bags = segments(lengths)
    table = random(9, hidden_size, seed=seed, dtype=dtype)
    rows, weights = integers(9, len(bags), seed + 1), random(len(bags), seed=seed + 2, dtype=dtype)
    exact_weights = weights.double().requires_grad_()
    expected = embedding_bag(rows, table.double(), offsets, mode="sum", per_sample_weights=exact_weights)
    got = ops.segment_sum(table, rows, weights, offsets)
    assert got.dtype == torch.float32
    # Sums of n numbers of size 1 are of size sqrt(n), and so are their errors; bfloat16 sums would be off by 1e-2.
    scale = max([1, *lengths]) ** 0.5
    torch.testing.assert_close(got.double(), expected.detach(), rtol=0, atol=3e-6 * scale)
    assert got[torch.tensor(lengths) == 0].abs().sum() == 0

    grads = random(len(lengths), hidden_size, seed=seed + 3)
    (expected,) = torch.autograd.grad(expected, exact_weights, grads.double())
    got = ops.segment_dot(grads, table, rows, bags)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-6 * hidden_size**0.5)


@pytest.mark.parametrize(
    ("lengths", "hidden_size"),
    [
        pytest.param([3, 0, 5, 1], 5, id="short"),
        pytest.param([0, 0, 700, 0, 2, 130, 128, 0], 33, id="one long segment"),
        pytest.param([0, 128, 128, 0, 129, 127], 16, id="segments that are blocks"),
        pytest.param([1] * 40, 257, id="more columns than one warp's, and one"),
        pytest.param([2, 9], 1024, id="a multiple of a warp's columns"),
        pytest.param([6], 1, id="one column"),
    ],
)
@dtypes
@needs_triton
def test_segments(ops: ModuleType, lengths: list[int], hidden_size: int, dtype: torch.dtype) -> None:
    check_segments(ops, lengths, hidden_size, dtype, seed=0)


@given(lengths=st.lists(st.integers(0, 19), min_size=1, max_size=6), hidden_size=st.integers(1, 9), seed=seeds)
@properties
@needs_triton
def test_segments_of_any_lengths(small_blocks: ModuleType, lengths: list[int], hidden_size: int, seed: int) -> None:
    check_segments(small_blocks, lengths or [0], hidden_size, torch.float32, seed)


@needs_triton
def test_segments_of_nothing(ops: ModuleType) -> None:
    table, nothing = random(4, 3, seed=0), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    sums = ops.segment_sum(table, nothing, random(0, seed=1), torch.zeros(5, dtype=torch.int64, device=DEVICE))
    assert sums.tolist() == [[0.0] * 3] * 5
    assert ops.segment_sum(table, nothing, random(0, seed=1), nothing).shape == (0, 3)
    assert ops.segment_dot(table, table, nothing, nothing).shape == (0,)


@needs_triton
def test_a_long_segment_is_summed_in_the_same_order_wherever_programs_run(ops: ModuleType) -> None:
    offsets, _ = segments([5, 900, 1])
    table, rows, weights = random(50, 40, seed=0), integers(50, 906, 1), random(906, seed=2)
    first = ops.segment_sum(table, rows, weights, offsets)
    assert all(torch.equal(first, ops.segment_sum(table, rows, weights, offsets)) for _ in range(2))


@needs_triton
def test_tables_that_are_parts_of_larger_ones(ops: ModuleType) -> None:
    """Columns of a wider matrix, and every second place: strides that the kernels do not know."""
    offsets, bags = segments([2, 0, 3])
    wide, rows, weights = random(6, 14, seed=0), integers(6, 10, 1)[::2], random(10, seed=2)[::2]
    table, grads = wide[:, 3:10], random(3, 14, seed=3)[:, ::2]
    expected = embedding_bag(rows, table.contiguous(), offsets, mode="sum", per_sample_weights=weights.contiguous())
    torch.testing.assert_close(ops.segment_sum(table, rows, weights, offsets), expected)
    torch.testing.assert_close(ops.segment_dot(grads, table, rows, bags), (grads[bags] * table[rows]).sum(1))


@needs_triton
def test_tables_of_more_than_two_to_the_31_numbers(ops: ModuleType) -> None:
    """On a CPU only the pages that are touched exist."""
    hidden_size = 4096
    last = 2**31 // hidden_size
    table = torch.empty(last + 1, hidden_size, dtype=torch.bfloat16, device=DEVICE)
    table[last] = 2
    table[last, 7] = 3
    rows = torch.full((2,), last, device=DEVICE)
    weights = torch.tensor([1.0, 10.0], device=DEVICE)
    sums = ops.segment_sum(table, rows, weights, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    assert sums[0, 5:9].tolist() == [22.0, 22.0, 33.0, 22.0]
    grads = torch.ones(1, hidden_size, device=DEVICE)
    assert ops.segment_dot(grads, table, rows, torch.zeros_like(rows)).tolist() == [2.0 * hidden_size + 1] * 2


def check_compaction(ops: ModuleType, pre: Tensor, threshold: Tensor) -> int:
    """Places and values are those of torch, bit for bit, at every capacity. Returns how many there are."""
    expected = (pre > threshold).flatten().nonzero().squeeze(-1)
    count = expected.numel()
    places, values, counted = ops.compact_above(pre, threshold)
    assert places.dtype == torch.int64
    assert torch.equal(places, expected)
    assert torch.equal(values, pre.flatten()[expected])
    assert counted.item() == count
    for capacity in {0, count // 2, count, count + 5}:
        fitting = min(capacity, count)
        places, values, counted = ops.compact_above(pre, threshold, capacity)
        assert torch.equal(places[:fitting], expected[:fitting])
        assert torch.equal(values[:fitting], pre.flatten()[expected[:fitting]])
        assert places[fitting:].tolist() == [pre.numel()] * (capacity - fitting)
        assert values[fitting:].tolist() == [-torch.inf] * (capacity - fitting)
        assert counted.item() == count
    return count


@given(
    tokens=st.integers(1, 9),
    latents=st.integers(1, 50),
    threshold=st.floats(-2, 3, width=16),
    bfloat16=st.booleans(),
    seed=seeds,
)
@properties
@needs_triton
def test_compaction(
    small_blocks: ModuleType, tokens: int, latents: int, threshold: float, bfloat16: bool, seed: int
) -> None:
    pre = random(tokens, latents, seed=seed, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    check_compaction(small_blocks, pre, torch.tensor(threshold, dtype=pre.dtype, device=DEVICE))


@dtypes
@needs_triton
def test_compaction_of_a_sparse_batch(ops: ModuleType, dtype: torch.dtype) -> None:
    pre = random(40, 3001, seed=0, dtype=dtype)
    threshold = pre.float().flatten().sort().values[-400].to(dtype)
    # Some of the 400 equal the threshold in the shorter dtypes, and those do not exceed it.
    assert 100 < check_compaction(ops, pre, threshold) < 400


@needs_triton
def test_compaction_at_the_borders_of_words_and_blocks(ops: ModuleType) -> None:
    pre = torch.zeros(3, ops.BLOCK, device=DEVICE)
    places = [0, 31, 32, 63, ops.BLOCK - 1, ops.BLOCK, ops.BLOCK + 31, 3 * ops.BLOCK - 32, 3 * ops.BLOCK - 1]
    pre.view(-1)[places] = 1
    assert ops.compact_above(pre, torch.tensor(0.0, device=DEVICE)).places.tolist() == places
    full = torch.ones(2, 70, device=DEVICE)
    assert ops.compact_above(full, torch.tensor(0.5, device=DEVICE)).places.tolist() == list(range(140))


@needs_triton
def test_compaction_of_values_that_are_no_ordinary_numbers(ops: ModuleType) -> None:
    pre = torch.tensor([[torch.nan, torch.inf, -torch.inf], [1.0, -0.0, 1e-45]], device=DEVICE)
    assert check_compaction(ops, pre, torch.tensor(0.0, device=DEVICE)) == 3
    assert check_compaction(ops, pre, torch.tensor(1.0, device=DEVICE)) == 1
    assert check_compaction(ops, pre, torch.tensor(torch.inf, device=DEVICE)) == 0
    assert check_compaction(ops, pre[:0], torch.tensor(0.0, device=DEVICE)) == 0


@needs_triton
def test_compaction_rounds_the_threshold_as_torch_does(ops: ModuleType) -> None:
    pre = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16, device=DEVICE)
    # In bfloat16 this threshold is 1, which 1 does not exceed.
    assert check_compaction(ops, pre, torch.tensor(1 - 2**-12, device=DEVICE)) == 1


@contextmanager
def no_place_is_written_twice() -> Iterator[None]:
    """Fails in the interpreter, whose programs run one after the other, where they would race on a GPU."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    store, written = InterpreterBuilder.create_masked_store, set()

    def noting(self, pointers, value, mask, *options):
        addresses = pointers.data[mask.data].tolist()
        assert len(written | set(addresses)) == len(written) + len(addresses)
        written.update(addresses)
        return store(self, pointers, value, mask, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_store", noting)
        yield


def check_largest(ops: ModuleType, values: Tensor, count: int) -> None:
    """Of candidates without NaN those are kept, in their order, that a stable sort puts first."""
    places = integers(1 << 40, values.numel(), seed=count)
    chosen = values.double().sort(descending=True, stable=True).indices[:count].sort().values
    with no_place_is_written_twice():
        kept, largest = ops.compact_largest(places, values, count)
    assert (kept.dtype, largest.dtype) == (torch.int64, values.dtype)
    assert torch.equal(kept, places[chosen])
    assert torch.equal(largest, values[chosen])


@given(
    size=st.integers(0, 150),
    count=st.integers(0, 160),
    levels=st.sampled_from([1, 2, 7, 1 << 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=seeds,
)
@properties
@needs_triton
def test_the_largest_of_candidates(
    small_blocks: ModuleType, size: int, count: int, levels: int, dtype: torch.dtype, seed: int
) -> None:
    """However many are equal, and also where more are asked for than there are."""
    values = (integers(levels, size, seed) / levels + 1).to(dtype)
    check_largest(small_blocks, values, count)
    check_largest(small_blocks, values, size // 2)


@dtypes
@needs_triton
def test_the_largest_of_candidates_in_whole_blocks(ops: ModuleType, dtype: torch.dtype) -> None:
    for size in (ops.CANDIDATES, 3 * ops.CANDIDATES + 17):
        values = random(size, seed=0, dtype=dtype)
        for count in (1, size // 2, size - 1, size):
            check_largest(ops, values, count)
        # All equal: the first of them.
        check_largest(ops, torch.ones_like(values), size - 5)


@needs_triton
def test_the_largest_of_values_that_are_no_ordinary_numbers(small_blocks: ModuleType) -> None:
    values = torch.tensor([torch.inf, -torch.inf, 1e-45, -0.0, 0.0, -1.0, torch.inf, 1e-45, 2.0] * 5, device=DEVICE)
    for count in range(len(values) + 1):
        check_largest(small_blocks, values, count)
    # NaN are no candidates. With them there is still something in every place, once and in order.
    values[[3, 20]] = torch.nan
    numbers = torch.arange(len(values), device=DEVICE)
    for count in (1, 17, len(values)):
        places, largest = small_blocks.compact_largest(numbers, values, count)
        assert torch.equal(places, numbers[:count])
        assert torch.equal(largest.nan_to_num(7), values[:count].nan_to_num(7))


@needs_triton
def test_candidates_that_are_parts_of_others(ops: ModuleType) -> None:
    wide, places = random(40, 2, seed=0), integers(99, 80, 1)[::2]
    kept, largest = ops.compact_largest(places, wide[:, 1], 11)
    chosen = wide[:, 1].topk(11).indices.sort().values
    assert torch.equal(kept, places[chosen])
    assert torch.equal(largest, wide[chosen, 1])


@pytest.mark.skipif(not INTERPRETED, reason="takes the kernels for the CPU's tensors")
@given(**TIES)
@properties
@needs_triton
def test_of_equal_pre_activations_the_kernels_select_the_first(small_blocks: ModuleType, **batch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_encoder, "has_kernels", lambda table: True)
        patch.setattr(sparse_encoder, "_product_takes_bias", lambda x: True)
        check_ties(**batch)


@needs_triton
def test_what_is_not_summed_in_float32_is_refused(ops: ModuleType) -> None:
    doubles, indices = random(2, 2, seed=0).double(), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for call in (
        lambda: ops.segment_sum(doubles, indices, random(2, seed=0), indices),
        lambda: ops.segment_dot(random(2, 2, seed=0), doubles, indices, indices),
        lambda: ops.compact_above(doubles, torch.tensor(0.0)),
        lambda: ops.compact_largest(indices, doubles[0], 1),
    ):
        with pytest.raises(ValueError, match=r"torch\.float16.*got torch\.float64"):
            call()


@needs_triton
def test_a_threshold_per_latent_is_refused(ops: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"one threshold, got \(2,\)"):
        ops.compact_above(random(3, 2, seed=0), torch.zeros(2, device=DEVICE))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@needs_triton
def test_in_the_interpreter() -> None:
    """Every check above, and a step of training, without a GPU."""
    here = Path(__file__).parent
    step = here.parent / "training/test_on_a_gpu.py::test_a_step_with_the_kernels"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", __file__, here / "test_triton_rows.py", step],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=SOURCE.parents[1],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "needs triton" not in run.stdout
    assert len(re.findall(r"::test_a_step_with_the_kernels\S* PASSED", run.stdout)) == 2
    assert int(re.findall(r"(\d+) passed", run.stdout)[-1]) >= 61


# (kernel, arguments' types, which of them are multiples of 16 as they are in practice, blocks, warps)
KERNELS = {
    "_block_sums": (
        ["*fp32", "*{dtype}", "*i64", "*{dtype}", "*i1", "i32"],
        {"partials", "table", "rows", "weights", "hidden_size"},
        ["SPLIT", "ROWS", "COLUMNS"],
        1,
    ),
    "_segment_sums": (
        ["*fp32", "*fp32", "*{dtype}", "*i64", "*{dtype}", "*i64", "i32", "i32", "i32"],
        {"out", "partials", "table", "rows", "weights", "offsets", "hidden_size"},
        ["SPLIT", "ROWS", "COLUMNS"],
        1,
    ),
    "_dots": (
        ["*fp32", "*fp32", "*{dtype}", "*i64", "*i64", "i32", "i32"],
        {"out", "grads", "table", "rows", "bags", "hidden_size"},
        ["PLACES", "COLUMNS"],
        1,
    ),
    "_mark_above": (
        ["*i32", "*i32", "*{dtype}", "*{dtype}", "i64"],
        {"words", "counts", "pre", "size"},
        ["BLOCK", "WORD"],
        4,
    ),
    "_write_above": (
        ["*i64", "*{dtype}", "*i32", "*i64", "*{dtype}", "i32"],
        {"places", "values", "words", "first", "pre"},
        ["BLOCK", "WORD"],
        1,
    ),
    "_count_largest": (
        ["*i64", "*{dtype}", "*{dtype}", "i32", "i32"],
        {"counts", "values", "border"},
        ["SPANS", "CANDIDATES"],
        4,
    ),
    "_write_largest": (
        ["*i64", "*{dtype}", "*i64", "*i64", "*{dtype}", "*{dtype}", "i32", "i32", "i32"],
        {"out_places", "out_values", "counts", "places", "values", "border"},
        ["SPANS", "CANDIDATES"],
        4,
    ),
}
# What is read one number at a time: places are scattered, and how many candidates there are is a multiple of nothing.
NARROW = ("_write_above", "_count_largest", "_write_largest")


@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp32"), (80, "bf16"), (90, "fp32"), (90, "bf16")])
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@needs_triton
def test_kernels_compile_for_ampere_and_hopper(
    triton_ops: ModuleType, capability: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and pre-activations are read 128 bits at a time, and nothing spills to memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, (types, multiples, blocks, warps) in KERNELS.items():
        types = [type_.format(dtype=dtype) for type_ in types]
        sizes = {block: getattr(triton_ops, block) for block in blocks}
        options = {**triton_ops.OPTIONS, "num_warps": warps}
        code = compiled(getattr(triton_ops, name), types, multiples, sizes, options, capability)
        assert ".local" not in code
        if name not in NARROW:
            assert WIDE_LOAD.search(code), name


# A reader of a checkpoint need not have triton


def test_transformers_does_not_ask_a_reader_for_triton() -> None:
    assert get_imports(SOURCE) == ["torch", "typing"]
    assert get_relative_imports(SOURCE) == []


def test_without_triton_the_import_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="triton_ops needs triton"):
        runpy.run_path(str(SOURCE))
