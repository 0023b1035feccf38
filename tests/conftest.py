"""Fixtures shared by all tests.

One thread, so that runs repeat bit for bit; a tokenizer of sixty words and a random LM of two layers, small enough to
try every property many times; a real LM and real text, where they lie beside the checkout; and a Hub on this machine.

The Hub's address and a cache of the tests' own are set before anything of Hugging Face is imported, because its
libraries read them once. So no test reaches the real Hub, or the caches of whoever runs the tests. Fixtures import
what takes seconds: the process that deals tests to workers reads this file, too, and needs none of it.
"""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

sys.path.append(str(Path(__file__).parent))  # for what lies here: pytest's importlib mode adds nothing

from local_hub.server import LocalHub
from slow_tests import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_ignore_collect,
    pytest_runtest_call,
    pytest_runtest_setup,
    pytest_unconfigure,
)

if TYPE_CHECKING:
    from known_world import KnownWorld
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_HUB = LocalHub()
_HF_HOME = tempfile.mkdtemp(prefix="hf-msae-tests-")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
for _name in (
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_CACHE",
):
    os.environ.pop(_name, None)
os.environ |= {"HF_ENDPOINT": _HUB.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": _HF_HOME}

os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported
# Hypothesis must not take a busy machine for a slow function.
# The same examples in every run, so that a run that fails fails again; `--hypothesis-seed N` looks at others.
settings.register_profile(
    "patient", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")

SHARED = Path(__file__).resolve().parents[2] / "shared"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|mark|> {{ m['role'] }} {{ m['content'] }} {% endfor %}{{ eos_token }}"
)


def _build_tokenizer(bos: bool = True) -> "PreTrainedTokenizerFast":
    """Words w0 … w59 and the roles of a chat; it does not add BOS by itself, as GPT-2's does not."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60)), "user", "assistant"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | ({"bos_token": "<s>"} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=16, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mark|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def build_tokenizer() -> "Callable[..., PreTrainedTokenizerFast]":
    """Makes a tokenizer that a test may change; `bos=False` for one without BOS."""
    return _build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    return _build_tokenizer()


@pytest.fixture(scope="session")
def lm() -> "LlamaForCausalLM":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def known(tokenizer: "PreTrainedTokenizerFast") -> "KnownWorld":
    """A language model and an SAE in which everything is known."""
    from known_world import build

    return build(tokenizer)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """300 documents (more than one batch of the tokenizer) of 1 to 40 words."""
    import torch

    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 41, (300,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(60, (n,), generator=generator).tolist()) for n in lengths]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text and a real pretrained LM beside the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the folder ../shared/data beside the checkout (real text and the LM stories260K)")
    return SHARED / "data"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """An empty Hub at `HF_ENDPOINT` and an empty cache, logged in as `hub.user`.

    `token=False` asks without a token, `token=hub.read_token` or `hub.stranger_token` as others. Subprocesses find the
    same Hub, cache and login through the environment.
    """
    from huggingface_hub import constants

    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    _HUB.reset()
    monkeypatch.setenv("HF_TOKEN", _HUB.token)
    yield _HUB
    _HUB.reset()


@pytest.fixture(scope="session")
def stories260k(shared_data: Path):
    """The pretrained LM stories260K and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = shared_data / "stories260K"
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
