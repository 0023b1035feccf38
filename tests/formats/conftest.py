"""What the tests of every format share: checkpoints that other libraries wrote, and weights for layouts built here.

A test that needs another library has the marker `peer`, and is skipped where the library is absent: `make peers` has
them, and runs these tests alone.
"""

import importlib
import os
import re
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_msae import MatryoshkaSAE
from hf_msae.formats import conversion
from hf_msae.formats.common import Files
from hf_msae.formats.conversion import load_library_checkpoint

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"

# Where Triton is installed, as it comes with torch, sparsify takes its kernels on a CPU, too, which has no driver.
if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"


PEER_IS_ABSENT = re.compile(r"needs .*(SAELens|SAEBench|TransformerLens|sae-lens|eai-sparsify|dictionary-learning)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is compared with SAELens' own classes needs them."""
    for item in items:
        if isinstance(item, pytest.Function) and "sae_lens" in item.fixturenames:
            item.add_marker(pytest.mark.peer)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that is skipped for a library and lacks the marker: it would run nowhere."""
    report = yield
    skipped = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    if PEER_IS_ABSENT.search(skipped) and item.get_closest_marker("peer") is None:
        report.outcome, report.longrepr = "failed", f"it {skipped}, so it needs @pytest.mark.peer"
    return report


@pytest.fixture(autouse=True)
def _outlines_say_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every checkpoint that a test of this folder reads: what is said of it before is what is read, or nothing."""
    read = conversion._read

    def compared(name: str, files: Files, prefix_sizes=None, calibrating: bool = False):
        config, state = read(name, files, prefix_sizes, calibrating)
        outline = importlib.import_module(f"hf_msae.formats.{name}").outline(files)
        said = {field: value for field, value in asdict(outline).items() if value is not None and field != "needs"}
        assert prefix_sizes is not None or outline.needs is None
        # Gemma Scope's names say widths that checkpoints of tests do not have.
        apart = ("num_latents", "prefix_sizes") if name == "gemma_scope" else ()
        for field in apart if prefix_sizes is None else (*apart, "prefix_sizes"):
            said.pop(field, None)
        assert said == {field: getattr(config, field) for field in said}, str(files)
        return config, state

    monkeypatch.setattr(conversion, "_read", compared)


@pytest.fixture(scope="session")
def library_checkpoints() -> Path:
    """The folder of checkpoints written by other libraries' own code, beside the checkout."""
    if not FIXTURES.is_dir():
        pytest.skip("needs the folder ../shared/fixtures beside the checkout (checkpoints that other libraries wrote)")
    return FIXTURES


@pytest.fixture
def imported() -> Callable[..., MatryoshkaSAE]:
    """Imports a checkpoint: `imported(folder, library, prefix_sizes=None, **more)`."""
    return lambda source, library, prefix_sizes=None, **more: load_library_checkpoint(
        MatryoshkaSAE, source, library, prefix_sizes, **more
    )


@pytest.fixture
def reproduces() -> Callable[[MatryoshkaSAE, Path], None]:
    """Asserts that an SAE gives the latents and reconstructions of an `expected.safetensors`."""

    def check(sae: MatryoshkaSAE, path: Path) -> None:
        expected = load_file(path)
        agree(sae, expected["x"], expected["latents"], expected["reconstruction"])

    return check


@pytest.fixture
def agrees() -> Callable[[MatryoshkaSAE, Tensor, Tensor, Tensor], None]:
    """Asserts latents and reconstruction of x to 1e-5, and that the comparison is about something."""
    return agree


def agree(sae: MatryoshkaSAE, x: Tensor, latents: Tensor, reconstruction: Tensor) -> None:
    with torch.no_grad():
        ours = sae.encode(x)
        assert 0 < (latents != 0).float().mean() < 1
        torch.testing.assert_close(ours, latents.to(ours.dtype), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae.decode(ours), reconstruction.to(ours.dtype), atol=1e-5, rtol=1e-5)


@pytest.fixture
def random_weights() -> Callable[..., dict[str, Tensor]]:
    """Random float32 weights, W_enc (d, F) and W_dec (F, d) as most libraries keep them, biases, and x (50, d)."""

    def make(hidden_size: int = 12, num_latents: int = 40, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        return {
            "x": normal(50, hidden_size) + 0.5,
            "W_enc": normal(hidden_size, num_latents) / hidden_size**0.5,
            "W_dec": normal(num_latents, hidden_size) / hidden_size**0.5,
            "b_enc": normal(num_latents) * 0.3,
            "b_dec": normal(hidden_size) * 0.3,
            "threshold": normal(num_latents).abs() * 0.5 + 0.1,
        }

    return make
