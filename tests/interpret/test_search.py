"""Latents planted on words are found by these words."""

import math

import pytest

from hf_msae.interpret import Interpretation, interpret, search_firing, search_labels, search_promoting
from hf_msae.interpret.pages import Label
from hf_msae.interpret.search import surprise_bits


@pytest.fixture(scope="module")
def pages(known, tmp_path_factory) -> Interpretation:
    folder = tmp_path_factory.mktemp("search") / "interpretation"
    return interpret(known.model, known.tokenizer, known.sae, known.texts, folder, max_tokens=10**6, packing=False)


def test_the_latent_of_a_word_comes_first_then_its_kind(known, pages):
    hits = search_firing("w4", known.model, known.tokenizer, known.sae, pages)
    # The rarer, the more surprising: the word, the fish, the animals; what fires on every word says nothing.
    assert [hit.latent for hit in hits] == [10, 5, 0, 1]
    assert hits[0].token == "w4"
    assert (hits[0].fired, hits[0].num_tokens) == (1, 1)
    assert hits[0].peak == pytest.approx(0.6)
    assert hits[0].relative == pytest.approx(1.0)
    assert hits[0].score == pytest.approx(-math.log2(pages.page(10).firing_rate))
    assert hits[-1].score < 0.01


def test_a_phrase_finds_what_its_words_share(known, pages):
    hits = search_firing("w0 w1 w2 w0 w2 w1", known.model, known.tokenizer, known.sae, pages, most=1)
    assert [hit.latent for hit in hits] == [4]  # birds
    assert hits[0].fired == hits[0].num_tokens == 6


def test_surprise_is_the_information_of_firing_more_than_usual():
    assert surprise_bits(1, 1, 0.25, 10**6) == pytest.approx(2.0)
    assert surprise_bits(3, 3, 0.25, 10**6) == pytest.approx(6.0)
    assert surprise_bits(2, 4, 0.25, 10**6) == pytest.approx(4 * (0.5 * 1 + 0.5 * math.log2(0.5 / 0.75)))
    assert surprise_bits(1, 4, 0.25, 10**6) == 0.0
    assert surprise_bits(1, 9, 0.9, 10**6) == 0.0
    # Never seen in 1,000 tokens is no more than "less than half a time in 1,000".
    assert surprise_bits(1, 1, 0.0, 1000) == pytest.approx(math.log2(2000))
    assert surprise_bits(5, 5, 1.0, 1000) < 0.01


def test_words_find_the_latents_that_promote_them(known, pages):
    token = pages.page(0).promoted[0].token
    hits = search_promoting(f" {token.upper()} ", pages)
    best = next(hit for hit in hits if hit.latent == 0)
    assert (best.rank, best.effect) == (0, pages.page(0).promoted[0].effect)
    expected = {page.latent for page in pages if token in [effect.token for effect in page.promoted]}
    assert {hit.latent for hit in hits} == expected
    assert [hit.effect for hit in hits] == sorted((hit.effect for hit in hits), reverse=True)
    assert search_promoting("nosuchword", pages) == []


def test_labels_are_searched_by_their_words(known, tmp_path):
    pages = interpret(
        known.model, known.tokenizer, known.sae, known.texts, tmp_path / "i", max_tokens=100, packing=False
    )
    pages.save_labels({4: Label("birds that fly"), 5: Label("fish"), 0: Label("Animals, birds too")})
    assert [hit.latent for hit in search_labels("bird", pages)] == [4, 0]
    assert [(hit.latent, hit.score) for hit in search_labels("fly, bird!", pages)] == [(4, 1.0), (0, 0.5)]
    assert search_labels("tree", pages) == []


def test_empty_queries_are_refused(known, pages):
    with pytest.raises(ValueError, match="no token that counts"):
        search_firing("</s>", known.model, known.tokenizer, known.sae, pages)
    with pytest.raises(ValueError, match="empty word"):
        search_promoting("  ", pages)
    with pytest.raises(ValueError, match="no words to look for"):
        search_labels("?!", pages)
