"""The tree of a world in which everything is known, without an interpretation's files."""

import pytest

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.errors import InputError
from hf_msae.interpret import measure_hierarchy


def test_a_measured_tree_has_the_concepts_by_their_words(known):
    hierarchy, names = measure_hierarchy(known.model, known.tokenizer, known.sae, known.texts, max_tokens=1500)
    assert {(0, 4), (0, 5), (4, 6), (4, 7), (4, 8), (5, 9), (5, 10), (5, 11)} <= {
        (edge.parent, edge.child) for edge in hierarchy.edges
    }
    # Latents of words are called by them, those of a kind by its words, and what never fires says so.
    assert [names[6 + index] for index in range(6)] == [f"w{index}" for index in range(6)]
    assert set(names[4].split(", ")) == {"w0", "w1", "w2"}
    assert names[2] == "(never fires)"


def test_an_sae_without_levels_is_refused_by_its_name(known):
    flat = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=24, num_latents=6, prefix_sizes=[6], k=2))
    with pytest.raises(InputError, match=r"^mine has one level only"):
        measure_hierarchy(known.model, known.tokenizer, flat, known.texts, called="mine")
