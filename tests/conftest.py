"""Fixtures shared by all tests: one thread for repeatable timing, and the real LM and text where they lie beside the repo."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text and a real pretrained LM beside the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the folder ../shared/data beside the checkout (real text and the LM stories260K)")
    return SHARED / "data"


@pytest.fixture(scope="session")
def stories260k(shared_data: Path):
    """The pretrained LM stories260K and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = shared_data / "stories260K"
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
