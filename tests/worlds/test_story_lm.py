"""The language model of the story world, its tokenizer, and the labels of its tokens."""

import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from hf_msae.worlds.stories import CONCEPTS, StoryWorld, load_story_lm, story_lm_path, token_concepts
from hf_msae.worlds.stories.labels import PRONOUNS

pytestmark = pytest.mark.slow

GENDERS = {form: gender for gender, forms in PRONOUNS.items() for form in forms.values()}


def test_token_concepts_align_with_the_tokens(stories, story_lm):
    tokenizer = story_lm[1]
    for story in stories[:200]:
        ids = tokenizer(story.text)["input_ids"]
        labels = token_concepts(story.text, tokenizer)
        assert len(labels) == len(ids)
        assert labels[0] == ()
        spoken = [(tokenizer.decode([i]).strip(), label) for i, label in zip(ids, labels, strict=True) if label]
        assert spoken == [(story.text[start:end], concepts) for start, end, concepts in story.spans]


def test_token_concepts_label_every_piece_of_a_word(stories, stories260k):
    tokenizer = stories260k[1]
    for story in stories[:20]:
        encoding = tokenizer(story.text, return_offsets_mapping=True)
        for (start, end), label in zip(encoding["offset_mapping"], token_concepts(story.text, tokenizer), strict=True):
            expected = {name for s, e, concepts in story.spans if s < end and start < e for name in concepts}
            assert set(label) == (expected if end > start else set())


def test_token_concepts_need_offsets(stories):
    with pytest.raises(ValueError, match=r"fast tokenizer.*ByT5Tokenizer"):
        token_concepts(stories[0].text, ByT5Tokenizer())


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


def test_the_model_tells_stories_that_the_grammar_can_read(story_lm, readings):
    model, tokenizer = story_lm
    torch.manual_seed(0)
    start = torch.full((32, 1), tokenizer.bos_token_id)
    out = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_length=256)
    assert (out == tokenizer.eos_token_id).any(1).float().mean() > 0.9
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    assert len(set(texts)) == 32
    assert sum(len(readings(text)) == 1 for text in texts) >= 26
    assert sum(len({GENDERS[word] for word in text.lower().split() if word in GENDERS}) == 1 for text in texts) >= 24
