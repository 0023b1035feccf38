"""The kernels of whole rows against torch in float64, and compiled; `test_triton_ops` has them interpreted, too."""

import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from compiled_kernels import WIDE_LOAD, compiled
from torch import Tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (`pip install triton`)"),
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(scope="module")
def triton_rows() -> ModuleType:
    return importlib.import_module("hf_msae.modeling.triton_rows")


@pytest.fixture
def rows(triton_rows: ModuleType) -> ModuleType:
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("runs here in Triton's interpreter only (see test_triton_ops), and on CUDA where it is")
    return triton_rows


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


# One column, some, one more than a warp's block, and two blocks.
@pytest.mark.parametrize(("num_tokens", "num_groups", "width"), [(3, 1, 1), (2, 4, 5), (2, 3, 257), (1, 2, 512)])
@pytest.mark.parametrize("per_token", [False, True])
def test_levels(rows: ModuleType, num_tokens: int, num_groups: int, width: int, per_token: bool) -> None:
    parts, x = random(num_tokens, num_groups, width, seed=0), random(num_tokens, width, seed=1)
    base = random(num_tokens, width, seed=2) if per_token else random(width, seed=2)
    excess = parts.double().cumsum(1) + (base - x).double()[:, None]
    errors = rows.level_errors(parts, x, base)
    assert_close(errors, excess.square().sum((0, 2)))
    assert_close(parts, excess)
    scales = random(num_groups, seed=3)
    scaled = parts.double() * scales[:, None]
    assert_close(rows.level_gradients(parts, scales, True), scaled.flip(1).cumsum(1).flip(1))
    assert_close(rows.level_gradients(parts, scales, False), scaled)


def test_levels_of_no_tokens(rows: ModuleType) -> None:
    parts = random(0, 3, 4, seed=0)
    assert rows.level_errors(parts, random(0, 4, seed=1), random(4, seed=2)).tolist() == [0.0] * 3
    assert rows.level_gradients(parts, random(3, seed=1), True).shape == (0, 3, 4)


@pytest.mark.parametrize("width", [1, 5, 512, 600])
def test_products(rows: ModuleType, width: int) -> None:
    gradient, table = random(7, width, seed=0), random(7, width, seed=1)
    squares, products = rows.row_products(gradient, table)
    assert_close(squares, gradient.double().square().sum(1))
    assert_close(products, (gradient.double() * table.double()).sum(1))


def test_bfloat16_is_summed_in_float32(rows: ModuleType) -> None:
    gradient, table, x = (random(9, 300, seed=seed).bfloat16() for seed in range(3))
    squares, products = rows.row_products(gradient, table)
    assert_close(squares, gradient.double().square().sum(1))
    assert_close(products, (gradient.double() * table.double()).sum(1))
    parts, base = gradient.view(3, 3, 300).clone(), x[3]
    excess = parts.double().cumsum(1) + (base.double() - x[:3].double())[:, None]
    assert_close(rows.level_errors(parts, x[:3], base), excess.square().sum((0, 2)))
    torch.testing.assert_close(parts, excess.bfloat16())


@pytest.mark.parametrize("width", [2, 5, 600])
def test_steps_of_adam(rows: ModuleType, width: int) -> None:
    """Four steps with other rates, clipped and not, are those of projection, `torch.optim.Adam` and normalisation."""
    table, betas, eps = unit(random(7, width, seed=0)), (0.9, 0.9999), 1e-6
    exact = torch.nn.Parameter(table.double())
    adam = torch.optim.Adam([exact], betas=betas, eps=eps)
    average, square = torch.zeros_like(table), torch.zeros_like(table)
    for step, (lr, divisor) in enumerate([(0.1, 1.0), (0.2, 3.0), (0.01, 1.5), (0.1, 1.0)]):
        gradient = random(7, width, seed=step + 1)
        kept = gradient.clone()
        rows.adam_rows(
            table,
            gradient,
            average,
            square,
            radial=rows.row_products(gradient, table)[1],
            divisor=torch.tensor(divisor).to(DEVICE),
            corrections=torch.tensor([1 - beta ** (step + 1) for beta in betas]).to(DEVICE),
            lr=lr,
            betas=betas,
            eps=eps,
        )
        assert torch.equal(gradient, kept)
        exact.grad = (gradient.double() - (gradient.double() * exact).sum(1, keepdim=True) * exact).detach() / divisor
        adam.param_groups[0]["lr"] = lr
        adam.step()
        exact.data = unit(exact.data)
        state = adam.state[exact]
        for found, expected in ((table, exact.data), (average, state["exp_avg"])):
            assert_close(found, expected)
        torch.testing.assert_close(square.double(), state["exp_avg_sq"], rtol=5e-5, atol=1e-12)


def test_it_is_checked_before_it_is_used(rows: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    rows.check_kernels(device)
    for name in ("level_errors", "level_gradients", "row_products"):
        right = getattr(rows, name)
        with monkeypatch.context() as patch:
            patch.setattr(rows, name, lambda *args, right=right: _off(right(*args)))
            with pytest.raises(RuntimeError, match=name):
                rows.check_kernels(device)
    monkeypatch.setattr(rows, "adam_rows", lambda *args, **options: None)
    with pytest.raises(RuntimeError, match="adam_rows"):
        rows.check_kernels(device)


def _off(result):
    return tuple(map(_off, result)) if isinstance(result, tuple) else 1.01 * result


# Of each kernel: its arguments' types, and those that are no multiples of 16 in practice.
KERNELS = {
    "_level_errors": (["*fp32"] * 4 + ["i32"] * 3, {"num_groups"}),
    "_level_gradients": (["*fp32"] * 3 + ["i1", "i32", "i32"], {"running", "num_groups"}),
    "_row_products": (["*fp32"] * 4 + ["i32"], set()),
    "_adam_rows": (["*fp32"] * 8 + ["fp32"] * 4 + ["i32"], {"fresh1", "beta2", "fresh2", "eps"}),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("width", [768, 2304, 8192])
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_they_compile(triton_rows: ModuleType, capability: int, width: int, tmp_path: Path, monkeypatch) -> None:
    """Rows are read 128 bits at a time, and nothing spills to memory, also of a model as wide as one of 70B."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block, warps = triton_rows._whole_row(width)
    for name, (types, others) in KERNELS.items():
        kernel = getattr(triton_rows, name)
        whole = "BLOCK" in kernel.arg_names
        blocks = {"BLOCK": block} if whole else {"COLUMNS": triton_rows.COLUMNS}
        options = {**triton_rows.OPTIONS, "num_warps": warps if whole else 1}
        multiples = [argument for argument in kernel.arg_names[: len(types)] if argument not in others]
        code = compiled(kernel, types, multiples, blocks, options, capability)
        assert ".local" not in code, name
        assert WIDE_LOAD.search(code), name
