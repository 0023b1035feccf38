"""Words as a model's tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_msae.concepts.examples import ConceptError

# A token that is only the beginning of a word stands for it if it has so many letters.
MIN_LETTERS = 3


def tokens_of_words(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The tokens with which some words begin, at the beginning of a text and within it, in both cases, (n,) int64.

    A word of several tokens is known by its first one, if that has three letters or more.

    Args:
        words: the words.
        tokenizer: of the language model.

    Raises:
        ConceptError: a word is empty, or has no such token.
    """
    found: dict[int, None] = {}
    for word in words:
        tokens = _tokens(word.strip(), tokenizer)
        if not tokens:
            raise ConceptError(
                f"{word!r} is no token of the model, nor begins with one of {MIN_LETTERS} letters or more; give "
                "another word."
            )
        found |= dict.fromkeys(tokens)
    return torch.tensor(list(found), dtype=torch.int64)


def _tokens(word: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    forms = {form for cased in (word, word.lower(), word.capitalize()) for form in (cased, f" {cased}")}
    found = []
    for form in sorted(forms) if word else ():
        ids = tokenizer(form, add_special_tokens=False).input_ids
        # Some tokenizers write the space as a token of its own.
        while len(ids) > 1 and not str(tokenizer.decode(ids[:1])).strip():
            ids = ids[1:]
        text = str(tokenizer.decode(ids[:1])).strip() if ids else ""
        if text.casefold() == word.casefold() or (
            len(text) >= MIN_LETTERS and word.casefold().startswith(text.casefold())
        ):
            found.append(ids[0])
    return list(dict.fromkeys(found))
