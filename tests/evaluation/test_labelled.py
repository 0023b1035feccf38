"""Labels of tokens against the story world's own, and words of several tokens."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_msae.evaluation.labelled import STORY_SEED, labelled_documents, read_labelled, story_examples
from hf_msae.sites import capture, resolve_site
from hf_msae.worlds.stories import StoryWorld, ancestors, load_story_lm, token_concepts


@pytest.fixture(scope="module")
def story_lm():
    return load_story_lm()


@pytest.fixture(scope="module")
def examples(story_lm):
    model, tokenizer = story_lm
    return story_examples(model, tokenizer, resolve_site(model, "layers.1"), num_stories=60, context_length=256)


def test_tokens_carry_the_grammars_concepts(story_lm, examples):
    model, tokenizer = story_lm
    tokens, _ = examples
    site = resolve_site(model, "layers.1")
    text = StoryWorld(STORY_SEED).story(7).text
    concepts = token_concepts(text, tokenizer)[1:]  # without BOS
    rows = (tokens.document_of == 7).nonzero().flatten()
    assert len(rows) == len(concepts)
    for row, names in zip(rows, concepts, strict=True):
        found = {tokens.names[column] for column in tokens.labels[row].nonzero().flatten()}
        assert found == set(names) & set(tokens.names)
    hidden = capture(model, [site], **tokenizer(text, return_tensors="pt"))[site][0, 1:]
    assert torch.allclose(tokens.x[rows], hidden, atol=1e-4)
    assert tokens.labels.sum(0).min() >= 40
    assert tokens.parents["owl" if "owl" in tokens.names else "bird"] in ("bird", "animal")
    assert set(tokens.children("person")) <= {"female", "male", "worker"}


def test_documents_carry_what_happens_in_them(examples):
    _, documents = examples
    world = StoryWorld(STORY_SEED)
    assert documents.num_examples == 60
    for index in (0, 11, 42):
        hero = world.story(index).facts["hero"]
        sex = "female" if "female" in ancestors(hero) else "male"
        if sex in documents.names:
            assert documents.labels[index, list(documents.names).index(sex)]


def test_a_word_of_several_tokens_is_labelled_where_it_ends(shared_data):
    path = shared_data / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    tokens, _ = story_examples(model, tokenizer, resolve_site(model, "layers.1"), num_stories=30, context_length=512)
    text = StoryWorld(STORY_SEED).story(0).text
    all_tokens = len(tokenizer(text).input_ids) - 1
    labelled = int((tokens.document_of == 0).sum())
    words = sum(bool(names) for names in token_concepts(text, tokenizer))
    spans = len(StoryWorld(STORY_SEED).story(0).spans)
    # Every word with concepts keeps one token; its other tokens are left out.
    assert labelled == all_tokens - (words - spans)
    assert words > spans


def test_a_slow_tokenizer_is_refused_in_words(story_lm):
    model, _ = story_lm

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="need a fast tokenizer, which knows offsets; Slow is not"):
        story_examples(model, Slow(), resolve_site(model, "layers.1"), num_stories=1, context_length=64)


def test_documents_are_means_over_their_tokens(story_lm, tmp_path):
    model, tokenizer = story_lm
    site = resolve_site(model, "layers.1")
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(f'{{"text": "The owl saw {i} cats.", "label": {i % 2}}}\n' for i in range(100)))
    pairs = read_labelled(path)
    assert pairs[1] == ("The owl saw 1 cats.", "1")
    data = labelled_documents(model, tokenizer, site, pairs, description="owls", context_length=64)
    assert data.names == ["0", "1"]
    assert data.labels.sum(0).tolist() == [50, 50]
    hidden = capture(model, [site], **tokenizer(pairs[3][0], return_tensors="pt"))[site][0, 1:]
    assert torch.allclose(data.raw[3], hidden.mean(0), atol=1e-4)
