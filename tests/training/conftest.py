"""What the tests of training share: what lies beside them, and a trainer of a small run."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for what lies here: pytest's importlib mode adds nothing

from small_runs import make_trainer

from hf_msae.training import SAETrainer


@pytest.fixture
def trainer(tmp_path, lm, tokenizer, texts) -> Callable[..., SAETrainer]:
    """Makes a trainer of twelve steps that logs each, in a folder by its name."""

    def make(sae=None, name="run", **changes):
        changes = {"max_steps": 12, "logging_steps": 1} | changes
        return make_trainer(lm, tokenizer, texts, tmp_path / name, sae, **changes)

    return make
