"""Labels by a chat model: what it is asked, how its answers are read, and that the tests tell right from wrong."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_msae.interpret import LabelError, Labeller
from hf_msae.interpret.labels import auc, balanced_accuracy, explanation_prompt, parse_label, unseen_contexts
from hf_msae.interpret.pages import Context, LatentPage, TokenEffect

TEMPLATE = "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}</s>{% endif %}"


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Words by spaces; what it does not know is <unk>."""
    words = ["<unk>", "<s>", "</s>", "<pad>", "Yes", "No", "owl", "cat", "react", "Excerpt:", "<<owl>>", "<<cat>>"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def chat_model() -> LlamaForCausalLM:
    """Random and tiny."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        pad_token_id=3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def page_of(latent: int, word: str, others: str, count: int = 40) -> LatentPage:
    """A latent that fires on one word, in texts that are all different."""
    contexts = []
    for index in range(count):
        tokens = [f"{others}{index}", f" {word}", " end"]
        contexts.append(Context(tokens, [0.0, 2.0 - index / count, 0.0], 1, 1 - (index + 0.5) / count))
    promoted = [TokenEffect(" flew", 7, 0.5), TokenEffect(" ", 8, 0.4)]
    return LatentPage(latent, 0, 0.1, 1.0, 2.0, [1], 2.0, [word], promoted, [], [], contexts[:12], contexts[12:])


def test_the_explainer_sees_marked_contexts_from_the_top_and_from_below():
    page = page_of(3, "owl", "x")
    prompt = explanation_prompt(page)
    assert prompt.count("<<owl>>") == 10
    assert "- x0 <<owl>> end" in prompt
    assert "likelier next: flew." in prompt
    shown = {line[2:].replace("<<", "").replace(">>", "") for line in prompt.splitlines() if line.startswith("- ")}
    unseen = {context.text for context in unseen_contexts(page)}
    assert len(unseen) == 30
    assert not shown & unseen


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("Label: birds of prey.", "birds of prey"),
        ("They all name birds.\n**Label:** 'birds'\n", "birds"),
        ("label : a\nLabel: b", "b"),
        ("\nNames of birds\nand more", "Names of birds"),
        ("Label: " + "long " * 60, ("long " * 24)),
    ],
)
def test_labels_are_read_from_what_chat_models_write(written, label):
    assert parse_label(written) == label[:120]


def test_an_empty_answer_is_an_error():
    with pytest.raises(LabelError, match="wrote no label"):
        parse_label(" \n\n")


def test_scores_in_closed_form():
    assert auc([3.0, 2.0], [1.0, 2.0]) == (2 + 1.5) / 4
    assert auc([1.0], [1.0]) == 0.5
    assert balanced_accuracy([0.9, 0.8, 0.2], [0.1, 0.3, 0.85]) == pytest.approx(2 / 3)
    assert balanced_accuracy([0.99, 0.98], [0.97, 0.96]) == 1.0  # a judge that leans to Yes is not held to one half


def test_probabilities_are_those_of_yes_against_no_and_do_not_depend_on_the_batch(chat_model, chat_tokenizer):
    labeller = Labeller(chat_model, chat_tokenizer)
    prompts = ["owl cat", "cat", "owl owl owl cat react", *["cat owl"] * 9]
    together = labeller.probabilities(prompts)
    assert len(together) == 12
    for prompt, found in zip(prompts[:3], together, strict=False):
        ids = chat_tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.no_grad():
            logits = chat_model(ids).logits[0, -1]
        assert found == pytest.approx((logits[4] - logits[5]).sigmoid().item(), abs=1e-5)


def test_a_random_model_writes_a_label_and_its_scores_are_shares(chat_model, chat_tokenizer):
    labeller = Labeller(chat_model, chat_tokenizer)
    pages = [page_of(0, "owl", "x"), page_of(1, "cat", "y"), page_of(2, "fox", "z")]
    label = labeller.label_and_score(pages[0], pages)
    assert label.text
    assert 0 <= label.detection <= 1
    assert 0 <= label.fuzzing <= 1
    assert labeller.label_and_score(pages[0], pages) == label
    scores = labeller.score("owl", pages[0], pages)
    assert (scores.detection.num, scores.fuzzing.num) == (20, 20)


class OwlReader(LlamaForCausalLM):
    """Says Yes where the owl is marked, or where nothing is marked and an owl is there."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        excerpt = input_ids[:, -24:]
        marked, owls = (excerpt == 10).any(1), (excerpt == 6).sum(1) > 0
        output.logits[:, -1, 4] = (marked | owls).float() * 20 - 10
        output.logits[:, -1, 5] = 0
        return output


def test_a_judge_that_knows_is_told_from_chance(chat_model, chat_tokenizer):
    reader = OwlReader(chat_model.config)
    labeller = Labeller(reader, chat_tokenizer)
    pages = [page_of(0, "owl", "x"), page_of(1, "cat", "y")]
    scores = labeller.score("nothing known", pages[0], pages)
    assert (scores.detection.auc, scores.detection.balanced_accuracy) == (1.0, 1.0)
    # With wrong marks the owl is unmarked and still there, so this reader cannot tell.
    assert scores.fuzzing.auc == 0.5
    foreign = labeller.score("nothing known", pages[1], pages)
    assert foreign.detection.auc == 0.0


def test_a_latent_with_few_contexts_is_labelled_and_not_scored(chat_model, chat_tokenizer):
    labeller = Labeller(chat_model, chat_tokenizer)
    rare = page_of(0, "owl", "x", count=3)
    label = labeller.label_and_score(rare, [page_of(1, "cat", "y")])
    assert (label.detection, label.fuzzing) == (None, None)


def test_what_cannot_label_or_be_labelled_is_refused(chat_model, chat_tokenizer, lm, build_tokenizer):
    plain = build_tokenizer()
    plain.chat_template = None
    with pytest.raises(LabelError, match="has no chat template"):
        Labeller(lm, plain)
    with pytest.raises(LabelError, match="Yes and No begin with the same token"):
        Labeller(lm, build_tokenizer())
    dead = page_of(4, "owl", "x", count=0)
    with pytest.raises(LabelError, match="Latent 4 never fired"):
        Labeller(chat_model, chat_tokenizer).label(dead)
