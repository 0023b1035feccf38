"""Text that is given away piece by piece is the text, and ends before what it shall stop at."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_msae.serving.text import TextPieces
from hf_msae.worlds.stories import load_story_lm

TOKENIZER = load_story_lm()[1]
IDS = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=25)
STOPS = st.lists(st.text("aeht .", min_size=1, max_size=3), max_size=3)


def decode(ids: Sequence[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@given(IDS, IDS)
def test_the_pieces_are_what_follows_the_prompt(prompt, ids):
    pieces = TextPieces(TOKENIZER, prompt)
    found = "".join([*map(pieces.add, ids), pieces.end()])
    assert decode(prompt) + found == decode([*prompt, *ids])


@given(IDS, STOPS)
def test_a_text_ends_before_the_first_stop(ids, stops):
    pieces = TextPieces(TOKENIZER, [], stops)
    found = ""
    for token in ids:
        found += pieces.add(token)
        if pieces.ended:
            break
    found += pieces.end()
    whole = decode(ids)
    ends = [whole.find(stop) for stop in stops if stop in whole]
    if not ends:
        assert (found, pieces.ended) == (whole, False)
    else:
        assert pieces.ended
        assert whole.startswith(found)
        assert not any(stop in found for stop in stops)
        assert any(whole[len(found) :].startswith(stop) for stop in stops)


@pytest.mark.parametrize("text", ["é", "🦉", "a🦉b", "日本語"])
def test_letters_of_several_bytes_come_whole(text):
    pieces = TextPieces(TOKENIZER, TOKENIZER("The").input_ids)
    shown = [pieces.add(token) for token in TOKENIZER(text, add_special_tokens=False).input_ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)
    assert "".join(shown) + pieces.end() == decode(TOKENIZER(text, add_special_tokens=False).input_ids)
