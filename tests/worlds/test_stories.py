"""The story world: its tree, its English, its labels, its probabilities, and the language model trained on it."""

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from hf_msae.worlds.stories import (
    CONCEPTS,
    Story,
    StoryWorld,
    ancestors,
    children,
    depth,
    edges,
    leaves,
    load_story_lm,
    path,
    roots,
    story_lm_path,
    token_concepts,
)
from hf_msae.worlds.stories.concepts import CONCEPT_OF_WORD
from hf_msae.worlds.stories.grammar import FRAMES, PLOTS, Frame
from hf_msae.worlds.stories.slots import PLACE_BOOSTS, PREPOSITIONS, SLOTS, leaf_table

PRONOUNS = {"he": "male", "him": "male", "his": "male", "she": "female", "her": "female"}


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    world = StoryWorld(11)
    return [world.story(i) for i in range(500)]


@pytest.fixture(scope="module")
def story_lm():
    return load_story_lm()


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


def test_hero_and_place_are_named_and_siblings_exclude_each_other(stories):
    for story in stories:
        expressed = {name for _, _, concepts in story.spans for name in concepts}
        assert {story.facts["hero"], story.facts["place"]} <= expressed
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


def test_token_concepts_align_with_the_tokens(stories, story_lm):
    tokenizer = story_lm[1]
    for story in stories[:200]:
        ids = tokenizer(story.text)["input_ids"]
        labels = token_concepts(story, tokenizer)
        assert len(labels) == len(ids)
        assert labels[0] == ()
        spoken = [(tokenizer.decode([i]).strip(), label) for i, label in zip(ids, labels, strict=True) if label]
        assert spoken == [(story.text[start:end], concepts) for start, end, concepts in story.spans]


def test_token_concepts_label_every_piece_of_a_word(stories, stories260k):
    tokenizer = stories260k[1]
    for story in stories[:20]:
        encoding = tokenizer(story.text, return_offsets_mapping=True)
        for (start, end), label in zip(encoding["offset_mapping"], token_concepts(story, tokenizer), strict=True):
            expected = {name for s, e, concepts in story.spans if s < end and start < e for name in concepts}
            assert set(label) == (expected if end > start else set())


def test_token_concepts_need_offsets(stories):
    with pytest.raises(ValueError, match=r"fast tokenizer.*ByT5Tokenizer"):
        token_concepts(stories[0], ByT5Tokenizer())


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


# Reading a story back: the text determines the choices, so the choices' probability is the text's.


def _alternatives(words) -> str:
    return "(?:" + "|".join(sorted(set(words), key=len, reverse=True)) + ")"


@cache
def _slot_pattern(slot: str, form: str) -> str:
    """What a slot can look like, whatever fills the others: wider than the truth, so that one reading means one."""
    pronouns = {"he": ["he", "she"], "him": ["him", "her"], "his": ["his", "her"]}
    people = [CONCEPTS[leaf].word for leaf in leaves("girl") + leaves("boy")]
    if slot in pronouns or form == "his":
        return _alternatives(pronouns[form or slot])
    if slot == "H":
        return _alternatives(people + pronouns["he"])
    if slot == "child":
        return _alternatives(["girl", "boy"])
    if slot == "helper":
        relatives = [f"{p} {name}" for p in pronouns["his"] for name in leaves("woman") + leaves("man")]
        workers = [f"{'a' if form else 'the'} {name}" for name in leaves("worker")]
        friends = [f"{p} friend {name}" for p in pronouns["his"] for name in people] if form else people
        return _alternatives(relatives + workers + friends)
    nodes = ("place",) if slot == "place" else SLOTS[slot].nodes
    names = [leaf for node in nodes for leaf in leaves(node)]
    if form == "kind":
        return _alternatives(
            CONCEPTS[above].words[0] for name in names for above in ancestors(name) if CONCEPTS[above].words
        )
    if form == "at":
        return _alternatives(f"{PREPOSITIONS.get(name, 'in')} the {name}" for name in names)
    return _alternatives((CONCEPTS[name].plural or "") if form == "s" else CONCEPTS[name].word for name in names)


@cache
def _frame_pattern(frame: Frame) -> re.Pattern[str]:
    pattern = ""
    for part in frame.parts:
        text = re.escape(part.text)
        pattern += (text[:-2] + r"n?\ " if part.takes_article else text) + (
            _slot_pattern(part.slot, part.form) if part.slot else ""
        )
    return re.compile(pattern + "(?: |$)", re.IGNORECASE)


def readings(text: str) -> list[tuple[str, ...]]:
    """All the ways to read a text as a story: for each, its frames in order."""
    found: list[tuple[str, ...]] = []

    def read(name: str, side: str, position: int, act_index: int, so_far: tuple[str, ...]) -> None:
        acts = PLOTS[name].acts
        if act_index == len(acts):
            if position == len(text):
                found.append(so_far)
            return
        act, probability = acts[act_index]
        if probability < 1.0:
            read(name, side, position, act_index + 1, so_far)
        for frame in FRAMES[f"{name}.{act}" if act in PLOTS[name].frames else act.replace("@", side)]:
            match = _frame_pattern(frame).match(text, position)
            if match:
                read(name, side, match.end(), act_index + 1, (*so_far, frame.template))

    for name in PLOTS:
        for side in (".in", ".out"):
            read(name, side, 0, 0, ())
    return found


def test_a_story_has_one_reading_and_it_is_the_choices_that_made_it(stories):
    for story in stories:
        frames = tuple(choice.item for choice in story.choices if choice.point in FRAMES)
        assert readings(story.text) == [frames]


# The language model.


def test_the_shipped_model_is_small_and_complete(story_lm):
    model, tokenizer = story_lm
    files = {path.name for path in story_lm_path().iterdir()}
    assert files == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in story_lm_path().iterdir()) < 8_000_000
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    assert model.config.model_type == "llama"
    assert model.config.vocab_size == len(tokenizer)
    assert not model.training
    assert (tokenizer.model_max_length, tokenizer.bos_token, tokenizer.eos_token) == (256, "<s>", "</s>")


def test_every_word_is_one_token_and_stories_survive_the_round_trip(stories, story_lm):
    tokenizer = story_lm[1]
    for story in stories[:300]:
        ids = tokenizer(story.text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == story.text
        assert len(re.findall(r"\w+", story.text)) == sum(
            bool(re.search(r"\w", tokenizer.decode([i]))) for i in ids[1:]
        )
    for concept in CONCEPTS.values():
        for word in concept.words:
            assert len(tokenizer.encode(" " + word, add_special_tokens=False)) == 1


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60).filter(lambda text: "<" not in text))
def test_any_text_survives_the_round_trip(text):
    tokenizer = _tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@cache
def _tokenizer():
    return load_story_lm()[1]


def test_the_model_comes_close_to_the_entropy_of_the_stories_and_not_below(story_lm):
    model, tokenizer = story_lm
    world = StoryWorld(1_000)
    model_nats, world_nats, num_tokens = 0.0, 0.0, 0
    for i in range(50):
        story = world.story(i)
        ids = torch.tensor([[*tokenizer(story.text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        model_nats -= log_probs.gather(1, ids[0, 1:, None]).sum().item()
        world_nats -= story.log_prob
        num_tokens += ids.shape[1] - 1
    entropy, gap = world_nats / num_tokens, (model_nats - world_nats) / num_tokens
    assert 0.4 < entropy < 0.6
    assert 0.0 < gap < 0.05


def test_the_model_tells_stories_that_the_grammar_can_read(story_lm):
    model, tokenizer = story_lm
    torch.manual_seed(0)
    start = torch.full((32, 1), tokenizer.bos_token_id)
    out = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_length=256)
    assert (out == tokenizer.eos_token_id).any(1).float().mean() > 0.9
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    assert len(set(texts)) == 32
    assert sum(len(readings(text)) == 1 for text in texts) >= 20
    assert sum(len({PRONOUNS[word] for word in text.lower().split() if word in PRONOUNS}) == 1 for text in texts) >= 24
