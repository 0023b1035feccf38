"""The story world: its tree, its English, its labels and its probabilities."""

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_msae.worlds.stories import (
    CONCEPTS,
    StoryWorld,
    ancestors,
    children,
    depth,
    edges,
    leaves,
    path,
    roots,
)
from hf_msae.worlds.stories.concepts import CONCEPT_OF_WORD
from hf_msae.worlds.stories.grammar import FRAMES, PLOTS
from hf_msae.worlds.stories.slots import PLACE_BOOSTS, SLOTS, leaf_table

pytestmark = pytest.mark.slow

PRONOUNS = {"he": "male", "him": "male", "his": "male", "she": "female", "her": "female"}


# The tree.


def test_the_tree_is_large_deep_and_without_cycles():
    assert len(CONCEPTS) >= 150
    assert len(leaves()) >= 150
    deep_roots = {path(name)[-1] for name in CONCEPTS if depth(name) >= 2}
    assert len(deep_roots) >= 8
    assert path("pear") == ("pear", "fruit", "food")
    assert ancestors("owl") == ("bird", "animal")
    assert max(map(depth, CONCEPTS)) == 3
    reached = [name for root in roots() for name in _below(root)]
    assert sorted(reached) == sorted(CONCEPTS)
    assert len(list(edges())) == len(CONCEPTS) - len(roots())


def _below(name: str) -> Iterator[str]:
    yield name
    for child in children(name):
        yield from _below(child)


@given(st.sampled_from(sorted(CONCEPTS)))
def test_parents_and_children_agree(name):
    assert all(CONCEPTS[child].parent == name for child in children(name))
    assert depth(name) == len(path(name)) - 1
    assert set(leaves(name)) == {leaf for leaf in leaves() if name in path(leaf)}


def test_a_surface_form_belongs_to_one_concept():
    forms = [word for concept in CONCEPTS.values() for word in concept.words]
    assert len(forms) == len(set(forms))


def test_unknown_concepts_and_wordless_kinds_are_named_in_the_error():
    with pytest.raises(ValueError, match="'unicorn' is no concept"):
        ancestors("unicorn")
    with pytest.raises(ValueError, match="farm_animal"):
        _ = CONCEPTS["farm_animal"].word


# The stories.


def test_a_story_is_a_pure_function_of_seed_and_index():
    indices = list(range(40))
    forwards = {i: StoryWorld(3).story(i) for i in indices}
    world = StoryWorld(3)
    random.Random(0).shuffle(indices)
    for i in indices:
        assert world.story(i) == forwards[i]
    assert StoryWorld(4).story(0).text != forwards[0].text


def test_documents_are_a_sequence_of_story_texts():
    world = StoryWorld(2)
    documents = world.documents(30, start=5)
    assert len(documents) == 30
    assert documents[0] == world.story(5).text
    assert documents[-1] == world.story(34).text
    assert list(documents[10:12]) == [world.story(15).text, world.story(16).text]
    with pytest.raises(IndexError):
        documents[30]


@pytest.mark.parametrize(
    "call", [lambda: StoryWorld(-1), lambda: StoryWorld(0).story(-2), lambda: StoryWorld(0).documents(-3)]
)
def test_negative_numbers_are_refused(call):
    with pytest.raises(ValueError, match=r"got -\d"):
        call()


def test_there_are_many_frames_all_different_and_all_in_use():
    templates = [frame.template for frames in FRAMES.values() for frame in frames]
    assert len(templates) == len(set(templates))
    assert len(templates) >= 400
    drawn = {choice.item for i in range(3000) for choice in StoryWorld(0).story(i).choices if choice.point in FRAMES}
    assert drawn == set(templates)


def test_stories_differ_and_have_a_readable_length(stories):
    assert len({story.text for story in stories}) == len(stories)
    lengths = [len(story.text.split()) for story in stories]
    assert min(lengths) >= 50
    assert max(lengths) <= 150
    assert 85 <= sum(lengths) / len(lengths) <= 105


def test_a_or_an_as_the_next_word_asks(stories):
    checked = 0
    for story in stories:
        for article, word in re.findall(r"\b([Aa]n?) (\w+)", story.text):
            assert (article.lower() == "an") == (word[0].lower() in "aeiou" or word == "honest"), f"{article} {word}"
            checked += 1
    assert checked > 1500


def test_pronouns_agree_with_the_hero(stories):
    for story in stories:
        if story.facts["plot"] == "picnic":  # where the friend has a nose
            continue
        gender = "female" if "female" in path(story.facts["hero"]) else "male"
        used = {PRONOUNS[word] for word in re.findall(r"\w+", story.text.lower()) if word in PRONOUNS}
        assert used == {gender}, story.text


def test_sentences_begin_with_capitals_and_end_with_a_stop(stories):
    for story in stories:
        starts = [story.text[:2], *re.findall(r"[.!?] (..)", story.text)]
        assert all(start.lstrip('"')[0].isupper() for start in starts), story.text
        assert story.text.rstrip('"')[-1] in ".!?"
        assert "{" not in story.text
        assert "  " not in story.text


def test_all_that_was_drawn_is_written_and_siblings_exclude_each_other(stories):
    for story in stories:
        expressed = {name for _, _, concepts in story.spans for name in concepts}
        assert {story.facts["hero"], story.facts["place"]} <= expressed
        for slot in SLOTS.keys() & story.facts.keys():  # what was drawn was written, if only as "the bird"
            assert expressed & set(path(story.facts[slot])), slot
        for root in ("weather", "time_of_day", "instrument"):
            assert len(expressed & set(leaves(root))) <= 1, (root, story.text)


def test_slots_that_must_differ_do(stories):
    for story in stories:
        order = list(story.facts)  # in which the slots were filled
        for position, slot in enumerate(order):
            if slot in SLOTS:
                earlier = {story.facts[other] for other in order[:position] if other in SLOTS[slot].unlike}
                assert story.facts[slot] not in earlier


# The labels.


def test_spans_are_whole_words_and_their_concepts_one_path(stories):
    for story in stories:
        previous_end = 0
        for start, end, concepts in story.spans:
            word = story.text[start:end]
            assert start >= previous_end
            assert re.fullmatch(r"[A-Za-z]+", word)
            assert concepts == path(concepts[0])
            if word.lower() in PRONOUNS:
                assert concepts[0] == PRONOUNS[word.lower()]
            else:
                node = CONCEPTS[concepts[0]]
                assert {word, word.lower()} & {*node.words, node.plural}
            previous_end = end


def test_every_word_that_expresses_a_concept_is_labelled(stories):
    for story in stories:
        labelled = {(start, end) for start, end, _ in story.spans}
        for match in re.finditer(r"[A-Za-z]+", story.text):
            word = match.group()
            is_expressive = word in CONCEPT_OF_WORD or word.lower() in CONCEPT_OF_WORD or word.lower() in PRONOUNS
            assert ((match.start(), match.end()) in labelled) == is_expressive, word


# The probabilities.


def test_each_choice_point_is_a_distribution_and_log_prob_their_product(stories):
    for story in stories:
        product = 0.0
        for choice in story.choices:
            assert math.fsum(choice.table.probs) == pytest.approx(1.0, abs=1e-12)
            product += math.log(choice.table.probs[choice.index])
        assert story.log_prob == pytest.approx(product, abs=1e-9)


def test_draws_come_as_often_as_their_probability_says():
    expected: defaultdict[tuple[str, str], float] = defaultdict(float)
    drawn: Counter[tuple[str, str]] = Counter()
    for i in range(2000):
        for choice in StoryWorld(21).story(i).choices:
            drawn[choice.point, choice.item] += 1
            for item, prob in zip(choice.table.items, choice.table.probs, strict=True):
                expected[choice.point, item] += prob
    # A sum of independent draws has a variance of at most its mean: 5 standard deviations, over 3,000 outcomes.
    worst = max(abs(drawn[key] - mean) / math.sqrt(mean) for key, mean in expected.items() if mean >= 10)
    assert worst < 5.0
    assert not drawn.keys() - expected.keys()


def test_siblings_follow_zipf_and_frequencies_have_a_long_tail():
    table = leaf_table(["animal"], {})
    probs = dict(zip(table.items, table.probs, strict=True))
    assert probs["dog"] / probs["rabbit"] == pytest.approx(3.0)
    assert probs["owl"] / probs["hen"] == pytest.approx(4.0)
    world = StoryWorld(9)
    counts: Counter[str] = Counter()
    for i in range(3000):
        counts.update({name for _, _, concepts in world.story(i).spans for name in concepts})
    frequencies = sorted((counts[leaf] for leaf in leaves()), reverse=True)
    assert frequencies[0] > 100 * frequencies[-1]
    assert frequencies[len(frequencies) // 2] < frequencies[len(frequencies) // 20] / 4
    for parent, child in edges():
        if CONCEPTS[parent].parent is not None or CONCEPTS[parent].words:
            assert counts[parent] >= counts[child]


def test_topics_correlate_with_places():
    assert {name for boosts in PLACE_BOOSTS.values() for name in boosts} <= CONCEPTS.keys()
    assert {name for plot in PLOTS.values() for name in plot.boosts} <= CONCEPTS.keys()
    world = StoryWorld(9)
    seen: Counter[tuple[str, str]] = Counter()
    total: Counter[str] = Counter()
    for i in range(4000):
        story = world.story(i)
        place = story.facts["place"]
        total[place] += 1
        for name in {name for _, _, concepts in story.spans for name in concepts}:
            seen[place, name] += 1

    def rate(place: str, name: str) -> float:
        return seen[place, name] / total[place]

    assert rate("garage", "wrench") > 3 * rate("forest", "wrench")
    assert rate("forest", "wild_animal") > 1.5 * rate("kitchen", "wild_animal")
    assert rate("kitchen", "kitchen_tool") > 3 * rate("park", "kitchen_tool")
    assert rate("school", "teacher") > 3 * rate("harbour", "teacher")


def test_a_story_has_one_reading_and_it_is_the_choices_that_made_it(stories, readings):
    # So the probability of the choices is the probability of the text.
    for story in stories:
        frames = tuple(choice.item for choice in story.choices if choice.point in FRAMES)
        assert readings(story.text) == [frames]
