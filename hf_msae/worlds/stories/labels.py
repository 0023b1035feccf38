"""Which concepts the words of a text express.

A surface form belongs to one concept and a pronoun expresses no more than a gender, so labels need no context. They
are the same for a story of the grammar and for a text that a language model, steered or not, has written.
"""

import re

from transformers import PreTrainedTokenizerBase

from hf_msae.errors import InputError

from .concepts import CONCEPT_OF_WORD, path

Span = tuple[int, int, tuple[str, ...]]
"""Start and end in characters, and the concepts expressed there, the most specific first and the root last."""

PRONOUNS: dict[str, dict[str, str]] = {
    "female": {"he": "she", "him": "her", "his": "her"},
    "male": {"he": "he", "him": "him", "his": "his"},
}
"""By gender: the subject, object and possessive form."""

_GENDER_OF_PRONOUN = {form: gender for gender, forms in PRONOUNS.items() for form in forms.values()}
_WORD = re.compile(r"[A-Za-z]+")


def word_concepts(word: str) -> tuple[str, ...]:
    """The concepts that a word expresses, the most specific first and the root last; empty for a word without any.

    "owls" gives ("owl", "bird", "animal"), "she" gives ("female", "person").

    Args:
        word: the word, in any case.
    """
    lower = word.lower()
    name = CONCEPT_OF_WORD.get(word) or CONCEPT_OF_WORD.get(lower) or _GENDER_OF_PRONOUN.get(lower)
    return () if name is None else path(name)


def concept_spans(text: str) -> tuple[Span, ...]:
    """Every word of a text that expresses concepts, in order.

    Args:
        text: the text.

    Returns:
        Start and end in characters, and the concepts.
    """
    found = ((match.start(), match.end(), word_concepts(match.group())) for match in _WORD.finditer(text))
    return tuple(span for span in found if span[2])


def token_concepts(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, ...]]:
    """The concepts that each token of `tokenizer(text)` expresses, special tokens included (they express none).

    A token expresses what the words it overlaps express.

    Args:
        text: the text.
        tokenizer: of any model.

    Raises:
        InputError: the tokenizer is a slow one, which knows no offsets.
    """
    if not tokenizer.is_fast:
        raise InputError(f"token_concepts needs a fast tokenizer, which knows offsets; got {type(tokenizer).__name__}")
    spans = concept_spans(text)
    labels: list[tuple[str, ...]] = []
    position = 0
    for start, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]:
        while position < len(spans) and spans[position][1] <= start:
            position += 1
        overlapping = []
        for span_start, span_end, concepts in spans[position:]:
            if span_start >= end:
                break
            if span_end > start and end > start:
                overlapping.append(concepts)
        labels.append(tuple(dict.fromkeys(name for concepts in overlapping for name in concepts)))
    return labels
