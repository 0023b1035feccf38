"""What the tests of every format share: checkpoints that other libraries wrote, and weights for layouts built here."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_msae import MatryoshkaSAE
from hf_msae.formats.conversion import load_library_checkpoint

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"


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
