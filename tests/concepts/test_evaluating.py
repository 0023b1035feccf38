"""Steerings are measured as is said, on texts that are really written."""

import json
import math
import statistics
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from tests_of_concepts import texts_of

from hf_msae import evaluate_steering
from hf_msae.concepts import (
    METHODS,
    Concept,
    ConceptError,
    JudgeScorer,
    WordScorer,
    concepts_of_words,
    evaluating,
    read_concepts,
    write_steering_report,
)
from hf_msae.concepts.evaluating import NOTHING, harmonic_mean
from hf_msae.concepts.results import MethodResult, SteeringEvaluation, TextScores
from hf_msae.concepts.writing import Writer
from hf_msae.steering import Direction, steer_direction

BIRDS = ["w0", "w1", "w2"]
PROMPTS = ["w20 w21", "w22 w3 w4", "w5", "w23 w24"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [*texts_of(range(30, 40), 30, seed=1, always=[0, 1, 2]), *texts_of(range(20, 40), 30, seed=2)]


@pytest.fixture(scope="module")
def found(known, texts):
    sides = [texts_of(range(20, 40), 24, seed=seed) for seed in (3, 4)]
    unknown = Concept("nothing in particular", *sides)
    concepts = [*concepts_of_words({"birds": BIRDS}, texts), unknown]
    given = (known.model, known.tokenizer, known.sae, concepts, PROMPTS)
    return evaluate_steering(*given, strengths=[0.5, 2.0], loss=0.3, new_tokens=12, num_candidates=6)


def test_an_evaluation_that_was_interrupted_is_gone_on_with(known, texts, monkeypatch):
    """Concepts that are there are not measured again, unless they or the settings are others now."""
    concepts = concepts_of_words({"birds": BIRDS, "others": ["w30", "w31"]}, texts)
    given = (known.model, known.tokenizer, known.sae)
    options = {"methods": ["DiffMean", NOTHING], "strengths": [1.0], "new_tokens": 6, "num_candidates": 4}
    parts: list[dict] = []
    keep = lambda so_far: parts.append(json.loads(json.dumps(so_far.to_dict())))  # noqa: E731
    whole = evaluate_steering(*given, concepts, PROMPTS, **options, on_concept=keep)
    assert [list(part["keys"]) for part in parts] == [["birds"], ["birds", "others"]]
    assert parts[-1] == json.loads(json.dumps(whole.to_dict()))
    measured: list[str] = []
    measure = evaluating.find_with_shifts
    monkeypatch.setattr(evaluating, "find_with_shifts", lambda *all_: measured.append(all_[-1].name) or measure(*all_))
    begun = SteeringEvaluation.from_dict(parts[0])
    assert evaluate_steering(*given, concepts, PROMPTS, **options, done=begun) == whole
    assert measured == ["others"]
    for changes in ({"new_tokens": 5}, {"of": "another model"}, {"strengths": [2.0]}):
        measured.clear()
        evaluate_steering(*given, concepts[:1], PROMPTS, **(options | changes), done=begun)
        assert measured == ["birds"]
    measured.clear()
    other = [replace(concepts[0], words=("w0",))]
    evaluate_steering(*given, other, PROMPTS, **options, done=begun)
    assert measured == ["birds"]


def test_an_interval_is_that_of_means_over_concepts():
    scores = [0.0, 0.0, 0.2, 0.4, 0.6, 0.6, 0.9, 1.0]
    of = [TextScores(0, 0, None, score, 0, 1) for score in scores]
    results = [MethodResult(str(place), "one", 1.0, each, None, []) for place, each in enumerate(of)]
    low, high = SteeringEvaluation(results, {}).interval("one")
    mean, error = statistics.fmean(scores), statistics.pstdev(scores) / len(scores) ** 0.5
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.03)
    assert SteeringEvaluation(results[:2], {}).interval("one") is None


def test_every_method_is_tried_on_every_concept_that_is_known(found):
    assert found.methods == list(METHODS)
    assert {result.concept for result in found.results} == {"birds"} == found.latents.keys()
    assert "tells positive from negative" in found.skipped["nothing in particular"]
    for result in found.results:
        assert result.strength in ([0.5, 2.0] if result.kl is not None else [1.0])
        assert result.reported.num_texts == 2
        assert all(scores.num_texts == 4 for _, scores in result.curve)
    json.dumps(found.to_dict())


def test_scores_are_those_of_the_texts_that_steering_writes(known, found):
    """The curve of DiffMean at one strength, from its KL's shift, by generating alone, text by text."""
    (plain,) = found.of_method(NOTHING)
    writer = Writer(known.model, known.tokenizer, new_tokens=12, temperature=1.0, seed=0)
    ids = [writer.encode(prompt) for prompt in PROMPTS]
    written = writer.write(ids, nullcontext())
    says = WordScorer(BIRDS)
    losses = []
    for row, text in zip(ids, written, strict=True):
        whole = torch.tensor([[*row, *text.ids]])
        with torch.no_grad():
            log_probs = known.model(whole).logits[0, len(row) - 1 : -1].log_softmax(-1)
        losses.append(-log_probs[range(len(text.ids)), text.ids].mean().item())
    assert plain.curve[0][1].loss == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert plain.curve[0][1].concept == sum(says(text.text) for text in written) / 4
    usual = sum(losses) / 4
    fluency = [min(1.0, math.exp(usual - loss)) for loss in losses]
    assert plain.curve[0][1].fluency == pytest.approx(sum(fluency) / 4, rel=1e-4)
    # A batch gives what its rows give alone.
    vector = torch.ones(24)
    direction = Direction("model.embed_tokens:output", vector)
    together = writer.write(ids, steer_direction(known.model, direction, 3.0))
    for row, (prompt, text) in enumerate(zip(ids, together, strict=True)):
        alone = Writer(known.model, known.tokenizer, new_tokens=12, temperature=1.0, seed=row)
        assert alone.write([prompt], steer_direction(known.model, direction, 3.0)) == [text]


def test_the_chosen_strength_is_the_best_on_the_other_prompts(known, texts):
    """A scorer that wants no word at all is served best by strengths that are told apart by fluency alone."""
    concept = Concept("anything", texts[:30], texts[30:], words=BIRDS, scorer=lambda _: 1.0)
    given = (known.model, known.tokenizer, known.sae, [concept], PROMPTS)
    options = {"methods": ["few latents", "random direction"], "loss": 0.3, "new_tokens": 12, "num_candidates": 4}
    both = evaluate_steering(*given, strengths=[0.01, 8.0], **options)
    for result in both.results:
        assert result.strength == 0.01
        assert result.kl == pytest.approx(0, abs=1e-2)
        assert result.curve[0][1].fluency > result.curve[1][1].fluency


@pytest.mark.parametrize(
    ("values", "mean"), [([1, 1, 1], 1), ([0, 1, 1], 0), ([0.5, 1, 1], 0.75), ([0.2, 0.4], 0.8 / 3)]
)
def test_harmonic_means(values, mean):
    assert harmonic_mean(values) == pytest.approx(mean)


def test_words_are_whole_words():
    says = WordScorer(["owl", "barn owl", "O'Neil"])
    assert [says(text) for text in ("An Owl!", "owls", "the barn  owl", "o'neil", "")] == [1, 0, 1, 1, 0]


def test_a_judge_is_understood_or_counted():
    answers = ["2", "Rating: 1.", "I would say 0.0", "1 out of 2", "yes", "12", "1.5"]
    judge = JudgeScorer(lambda question: answers.pop(0), "owls")
    assert [judge("text") for _ in range(7)] == [1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert judge.nonsense == ["1 out of 2", "yes", "12", "1.5"]
    with pytest.raises(ConceptError, match="4 of 7 questions about 'owls' without a number"):
        judge.check()
    judge.num_asked = 8
    assert "4 of the judge's 8 answers had no number" in str(judge.check())


def test_a_judge_that_answers_nonsense_ends_it(known, texts):
    judge = JudgeScorer(lambda question: "what?", "birds")
    concept = Concept("birds", texts[:30], texts[30:], words=BIRDS, scorer=judge)
    with pytest.raises(ConceptError, match="take a larger or instruction-tuned model as judge"):
        evaluate_steering(
            known.model,
            known.tokenizer,
            known.sae,
            [concept],
            PROMPTS,
            methods=["few latents"],
            strengths=[1.0],
            new_tokens=4,
            num_candidates=2,
        )


def test_concepts_are_read_from_lines_and_from_axbench(tmp_path, texts):
    path = tmp_path / "concepts.jsonl"
    rows = [{"name": "birds", "words": BIRDS}, {"name": "other", "positive": ["a"], "negative": ["b", "c"]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    birds, other = read_concepts(path, texts)
    assert all(WordScorer(BIRDS)(text) for text in birds.positive)
    assert not any(WordScorer(BIRDS)(text) for text in birds.negative)
    assert len(birds.positive) + len(birds.negative) == len(texts)
    assert (other.positive, other.negative, other.words) == (["a"], ["b", "c"], ())
    rows = [
        {"output_concept": "owls", "output": "hoot", "category": "positive", "concept_id": 1},
        {"output_concept": "EEEEE", "output": "tax", "category": "negative", "concept_id": -1},
        {"output_concept": "law", "output": "court", "category": "positive", "concept_id": 2},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [(one.name, one.positive, one.negative) for one in read_concepts(path)] == [
        ("owls", ["hoot"], ["tax"]),
        ("law", ["court"], ["tax"]),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no rows of concepts"),
        ("{", "line 1, is no JSON"),
        ("[1]", "holds no rows of concepts"),
        ('{"words": ["a"]}', "row 1: expected an object with a name"),
        ('{"name": "a"}', "'a' needs words, or both"),
        ('{"name": "a", "words": "b"}', "words is a list of texts, got 'b'"),
        ('{"output_concept": "a", "output": "b", "category": "positive"}', "none of negative"),
    ],
)
def test_what_is_no_concept_is_told(tmp_path, content, said):
    path = tmp_path / "concepts.jsonl"
    path.write_text(content)
    with pytest.raises(ConceptError, match=said):
        read_concepts(path)
    with pytest.raises(ConceptError, match="is neither"):
        read_concepts(tmp_path)


def test_what_cannot_be_measured_is_refused(known, texts):
    concepts = concepts_of_words({"birds": BIRDS}, texts)
    given = (known.model, known.tokenizer, known.sae)
    for concepts_given, prompts, options, said in (
        ([], PROMPTS, {}, "No concept was given"),
        (concepts * 2, PROMPTS, {}, "'birds' is given twice"),
        (concepts, ["w1"], {}, "two are needed; got 1"),
        (concepts, PROMPTS, {"methods": ["magic"]}, "got magic"),
        (concepts, PROMPTS, {"strengths": [0.0]}, "finite numbers above 0"),
        (concepts, ["w1", " "], {}, "has no token that counts"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate_steering(*given, concepts_given, prompts, **options)


def test_the_report_has_all_of_it(found, tmp_path):
    write_steering_report(found, tmp_path / "report", "Birds")
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<svg" in page
    for said in (*METHODS, "left out", "nothing in particular", "harmonic mean"):
        assert said in page
