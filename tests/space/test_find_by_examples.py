"""Latents found by a visitor's examples: what is found is what the package finds, within bounds and in words."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from msae_space.examples import (
    EXAMPLE_TOKENS,
    MAX_EXAMPLES,
    MAX_EXAMPLES_TEXT,
    NEGATIVE,
    POSITIVE,
    WORDS,
    Asked,
    asked,
    dials_of,
    search,
)
from msae_space.loaded_sae import LoadedSAE, SpaceError
from msae_space.strengths import edits
from msae_space.tab_find import SEARCHES, draw_finding, run

from hf_msae.concepts import ConceptError, Finding
from hf_msae.steering import LatentEdit

pytestmark = pytest.mark.slow


def what(**changed: Any) -> Asked:
    return asked(**{"positive": POSITIVE, "negative": NEGATIVE, "words": WORDS, "max_latents": 3, **changed})


@pytest.fixture(scope="module")
def searched(loaded: LoadedSAE) -> list[str | Finding]:
    """All that a search of what the page begins with says."""
    return list(search(loaded, what()))


@pytest.fixture(scope="module")
def finding(searched: list[str | Finding]) -> Finding:
    assert isinstance(searched[-1], Finding)
    return searched[-1]


def test_a_search_says_what_it_does_and_gives_a_steering(searched, finding):
    steps = [one for one in searched if isinstance(one, str)]
    assert steps[0] == "Reading 24 examples"
    assert any(step.startswith("Pushing latent ") for step in steps)
    assert len(steps) == len(searched) - 1 > 10
    assert 1 <= len(finding.steering.edits) <= 3
    assert [token.strip() for token in finding.tokens] == WORDS.split(", ")
    assert finding.facts["positive"] == finding.facts["negative"] == 12
    assert finding.facts["tokens"] <= 24 * EXAMPLE_TOKENS


def test_its_sliders_shift_as_its_steering_does(loaded, finding):
    dials = dials_of(loaded, finding)
    written = edits(loaded, dials, "add")
    rows = loaded.sae.W_dec.detach()
    shift = sum(edit.value * loaded.maxima[edit.latent] * rows[edit.latent] for edit in written)
    meant = sum(edit.value * rows[edit.latent] for edit in finding.steering.edits if isinstance(edit, LatentEdit))
    assert torch.allclose(shift, meant, atol=0.002 * float(meant.norm()))


def test_what_is_found_is_drawn_by_level(loaded, index, finding):
    drawn = draw_finding(loaded, index, finding)
    assert drawn.count('data-do="apply"') == 1
    assert drawn.count('data-do="condition"') == len(finding.latents)
    for level in range(3):
        assert loaded.level_name(level).capitalize() in drawn
    assert "DiffMean of all tokens" in drawn
    assert "random latents" in drawn


FEW = "\n".join(POSITIVE.splitlines()[:4])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"positive": ""}, "There are 0 different positive examples, and 10 are needed"),
        ({"positive": FEW}, "There are 4 different positive examples"),
        ({"negative": "\n".join([FEW] * 9)}, "There are 4 different negative examples"),
        ({"negative": "\n".join(map(str, range(MAX_EXAMPLES + 1)))}, f"takes up to {MAX_EXAMPLES} of each kind"),
        ({"positive": "a" * (MAX_EXAMPLES_TEXT + 1)}, "Shorten it"),
        ({"positive": 7}, "must be text"),
        ({"words": "a," * 90 + "b"}, None),
        ({"words": ",".join(map(str, range(20)))}, "20 words to say"),
        ({"max_latents": 6}, "The number of latents must be"),
    ],
)
def test_what_cannot_be_looked_for_is_refused_before_anything_runs(changed, words):
    if words is None:  # a word that is said twice counts once
        assert what(**changed).words == ("a", "b")
        return
    with pytest.raises(SpaceError, match=words):
        what(**changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"negative": POSITIVE}, "are positive and negative at once, such as"),
        ({"words": "zebrafishes"}, "'zebrafishes' is no token of the model"),
        ({"words": ""}, "No token is typical of the positive examples"),
    ],
)
def test_what_shows_nothing_is_refused_in_a_sentence(loaded, changed, words):
    with pytest.raises(ConceptError, match=words):
        list(search(loaded, what(**changed)))


def test_whoever_leaves_ends_their_search(loaded):
    before = threading.active_count()
    running: Iterator[str | Finding] = search(loaded, what())
    next(running)
    assert threading.active_count() > before
    running.close()
    assert threading.active_count() == before


def test_a_visitor_stops_only_their_own_search(loaded, index):
    mine, others = (run(loaded, index, what(), visitor) for visitor in ("a", "b"))
    next(mine)
    next(others)
    SEARCHES.stop("a")
    assert [drawn for drawn, _ in mine][-1] == '<p class="msae-note">Stopped.</p>'
    (drawn, dials) = list(others)[-1]
    assert dials is not None
    assert 'data-do="apply"' in drawn
