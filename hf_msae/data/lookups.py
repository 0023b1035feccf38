"""Whose token ids a tokenized SAE knows: its table has a row for each, and means nothing with another tokenizer's."""

import hashlib
import json

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data.windows import vocabulary
from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAEConfig


def record_tokenizer(config: MatryoshkaSAEConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write into a tokenized SAE's configuration whose ids its table is of, after `check_lookup`.

    Args:
        config: The SAE's.
        tokenizer: The language model's.
    """
    config.lookup_tokenizer = tokenizer.name_or_path or None
    if config.lookup_vocabulary is None:  # else it is this tokenizer's, or it would have been refused
        config.lookup_vocabulary = _digest(tokenizer)


def check_lookup(
    config: MatryoshkaSAEConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, called: str = ""
) -> None:
    """Refuse to look tokens up in a table that is another tokenizer's.

    Args:
        config: The SAE's; of one that is not tokenized nothing is asked.
        model: The language model.
        tokenizer: Its tokenizer.
        called: The SAE's name in errors.

    Raises:
        InputError: The tokenizer has another vocabulary, or the model more token ids than the table has rows. It names
            both.
    """
    if not config.is_tokenized:
        return
    name, own = called or "This SAE", tokenizer.name_or_path or type(tokenizer).__name__
    if config.lookup_vocabulary is not None and config.lookup_vocabulary != _digest(tokenizer):
        raise InputError(
            f"{name} is tokenized: it adds a vector of each token of {config.lookup_tokenizer or 'its tokenizer'}, "
            f"and these are tokens of {own}, which has another vocabulary. Use the tokenizer of its language model."
        )
    rows = vocabulary(model)
    if config.lookup_size is not None and rows > config.lookup_size:
        raise InputError(
            f"{name} is tokenized and knows {config.lookup_size:,} token ids, and "
            f"{model.config.name_or_path or 'the language model'} has {rows:,}. Use the language model that it was "
            f"trained on{f', {config.base_model}' if config.base_model else ''}."
        )


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a vocabulary: which token has which id."""
    tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
