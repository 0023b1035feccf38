"""Fixtures shared by all tests.

One thread, so that runs repeat bit for bit; a tokenizer of sixty words and a random LM of two layers, small enough to
try every property many times; and a real LM and real text, where they lie beside the checkout.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|mark|> {{ m['role'] }} {{ m['content'] }} {% endfor %}{{ eos_token }}"
)


def _build_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Words w0 … w59 and the roles of a chat; it does not add BOS by itself, as GPT-2's does not."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60)), "user", "assistant"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | ({"bos_token": "<s>"} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=16, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mark|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes a tokenizer that a test may change; `bos=False` for one without BOS."""
    return _build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return _build_tokenizer()


@pytest.fixture(scope="session")
def lm() -> LlamaForCausalLM:
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
def texts() -> list[str]:
    """300 documents (more than one batch of the tokenizer) of 1 to 40 words."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 41, (300,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(60, (n,), generator=generator).tolist()) for n in lengths]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text and a real pretrained LM beside the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the folder ../shared/data beside the checkout (real text and the LM stories260K)")
    return SHARED / "data"


@pytest.fixture(scope="session")
def stories260k(shared_data: Path):
    """The pretrained LM stories260K and its tokenizer."""
    path = shared_data / "stories260K"
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
