"""Probing, absorption and erasure on a planted world: directions for an animal, a bird, an owl and so on, and SAEs
whose latents are written down.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import one_hot

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.evaluation import Evaluation
from hf_msae.evaluation.absorption import (
    AbsorptionMetric,
    AbsorptionResult,
    absorption_of,
    choose_concepts,
    measure_absorption,
)
from hf_msae.evaluation.erasure import draw_pairs, measure_perturbation, measure_removal
from hf_msae.evaluation.labelled import LabelledActivations
from hf_msae.evaluation.probes import make_split
from hf_msae.evaluation.probing import ProbingMetric, measure_probing

# Each parent has three children, on orthogonal directions: parent p is dimension p, child c is dimension 3 + c.
PARENTS = ["animal", "food", "place"]
CHILDREN = {parent: [f"{parent}_{i}" for i in range(3)] for parent in PARENTS}
NAMES = PARENTS + [child for parent in PARENTS for child in CHILDREN[parent]]
TREE = {child: parent for parent, found in CHILDREN.items() for child in found}
NOISE = 0.05


def plant(first_child: float) -> LabelledActivations:
    """A token for each of 9,000 children; the first of each parent has this share of it, the others the same each."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([first_child, (1 - first_child) / 2, (1 - first_child) / 2]).repeat(3)
    child = torch.multinomial(shares, 9000, replacement=True, generator=generator)
    labels = torch.cat([one_hot(child // 3, 3), one_hot(child, 9)], 1).bool()
    x = torch.cat([labels.float(), torch.zeros(9000, 4)], 1)
    x += NOISE * torch.randn(x.shape, generator=generator)
    return LabelledActivations(x, labels, NAMES, torch.arange(9000) // 30, "a planted world", TREE)


@pytest.fixture(scope="module")
def world() -> LabelledActivations:
    return plant(1 / 3)


def build(encoder: torch.Tensor, decoder: torch.Tensor, prefix_sizes: list[int]) -> MatryoshkaSAE:
    config = MatryoshkaSAEConfig(hidden_size=16, num_latents=len(encoder), prefix_sizes=prefix_sizes, k=2)
    sae = MatryoshkaSAE(config).eval()
    sae.threshold.fill_(0.5)
    with torch.no_grad():
        sae.W_enc.copy_(encoder)
        sae.W_dec.copy_(decoder)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def faithful() -> MatryoshkaSAE:
    """A latent for each concept, parents first."""
    rows = torch.eye(16)[:12]
    return build(rows, rows, [3, 12])


def absorbing() -> MatryoshkaSAE:
    """As faithful, but the latent of animal is silent on animal_0, whose own latent writes both directions."""
    encoder, decoder = torch.eye(16)[:12].clone(), torch.eye(16)[:12].clone()
    encoder[0, 3] = -1.0
    decoder[3, 0] = 1.0
    return build(encoder, decoder, [3, 12])


def splitting() -> MatryoshkaSAE:
    """No parents: each child's latent writes its parent too."""
    rows = torch.eye(16)[3:12].clone()
    decoder = rows.clone()
    for child in range(9):
        decoder[child, child // 3] = 1.0
    return build(rows, decoder, [9])


@pytest.fixture(scope="module")
def splits(world):
    return [make_split(world, seed) for seed in (0, 1)]


def test_one_latent_per_concept_probes_perfectly(world, splits):
    found = measure_probing(world, {"faithful": faithful(), "splitting": splitting()}, splits)
    assert found.concepts == NAMES
    by = {(s.features, s.prefix, s.k, s.split): s.accuracy for s in found.scores}
    assert by["whole activation", 16, 16, 0] > 0.99
    assert by["faithful", 12, 1, 0] > 0.99
    # With only the parents, the three parents are perfect; of their children nothing is known but the parent.
    assert by["faithful", 3, 1, 0] < 0.95
    # A child's latent tells a third of its parent's tokens: 1/3 found, and none of the rest wrongly.
    parents = found.by_concept["splitting"][:3]
    assert sum(parents) / 3 == pytest.approx((1 / 3 + 1) / 2, abs=0.04)
    assert by["splitting", 9, 5, 0] > 0.99
    assert {s.split for s in found.scores} == {0, 1}
    assert found.train_examples == 600
    assert found.test_examples == 400


def test_tables_of_probing_keep_what_is_no_sae_apart(world, splits):
    """The whole activation is read by a probe on 16 numbers, as no dictionary is."""
    found = measure_probing(world, {"faithful": faithful()}, splits[:1])
    of_saes, others = ProbingMetric().tables(found, Evaluation({"faithful": "method"}, {"faithful": [3, 12]}))
    assert of_saes.header[2:] == ["k = 1", "k = 2", "k = 5"]
    assert {row[0] for row in others.rows} == {s.features for s in found.scores} - {"faithful"}
    assert ["whole activation", "16"] in [row[:2] for row in others.rows]


def test_a_faithful_dictionary_absorbs_nothing(world, splits):
    levels, concepts = measure_absorption(world, faithful(), splits)
    assert [(level.prefix, level.split) for level in levels] == [(3, 0), (12, 0), (3, 1), (12, 1)]
    for level in levels:
        assert (level.concepts, level.refused) == (3, 0)
        assert level.full == 0
        assert level.fraction < 0.01
        assert level.split_latents == 1
        assert level.child_recall > 0.99
        assert level.worst_child > 0.99
        assert level.main_f1 > 0.99
        assert level.elsewhere == 0
    assert {item.concept for item in concepts} == set(PARENTS)
    assert [item.main for item in concepts if item.concept == "food"] == [[1], [1]]


def test_concepts_are_shown_one_by_one_with_the_whole_dictionary(world, splits):
    found = AbsorptionResult(*measure_absorption(world, faithful(), splits[:1]))
    evaluation = Evaluation({"faithful": "method"}, {"faithful": [3, 12]})
    details = AbsorptionMetric().details({"faithful": found}, evaluation)
    assert [(item.concept, item.prefix) for item in details.values["concepts"]] == [(name, 12) for name in PARENTS]
    childless = [replace(item, recalls={}) for item in found.concepts]
    assert AbsorptionMetric().details({"faithful": replace(found, concepts=childless)}, evaluation) is None


def test_a_latent_that_fires_everywhere_is_shown_to(world, splits):
    sae = faithful()
    with torch.no_grad():
        sae.b_enc[:3] = 1.0
    level = measure_absorption(world, sae, splits[:1])[0][0]
    assert level.prefix == 3
    assert level.child_recall == level.elsewhere == 1


def test_planted_absorption_is_found_in_its_amount():
    """One animal in twenty is absorbed, by a latent outside the first prefix."""
    rare = plant(0.05)
    split = make_split(rare, 0)
    levels, concepts = measure_absorption(rare, absorbing(), [split])
    narrow, whole = ([c for c in concepts if c.prefix == prefix] for prefix in (3, 12))
    assert [item.concept for item in whole] == PARENTS
    animal = whole[0]
    half = split.test.rows.shape[1] // 2
    absorbed = rare.labels[split.test.rows[0, :half], NAMES.index("animal_0")].double().mean().item()
    assert 0.02 < absorbed < 0.09
    assert animal.main == [0]
    assert animal.tokens == half
    assert animal.full == pytest.approx(absorbed)
    assert animal.fraction == pytest.approx(absorbed, abs=0.01)
    assert animal.recalls["animal_0"] == 0
    assert animal.recalls["animal_1"] > 0.99
    for item in whole[1:]:
        assert (item.full, item.recalls["food_0" if item.concept == "food" else "place_0"]) == (0, 1)
    assert narrow[0].full == 0  # there is no latent there that could absorb
    assert narrow[0].recalls["animal_0"] == 0
    level = next(level for level in levels if level.prefix == 12)
    assert level.full == pytest.approx(absorbed / 3)
    assert level.worst_child == pytest.approx(2 / 3, abs=0.01)


def test_a_special_case_that_is_worth_a_latent_counts_as_splitting(world, splits):
    """The definition's known edge: where a third of a concept is absorbed, the absorber is one of its main latents."""
    _, concepts = measure_absorption(world, absorbing(), splits[:1])
    animal = next(item for item in concepts if (item.concept, item.prefix) == ("animal", 12))
    assert animal.main == [0, 3]
    assert animal.full == 0
    assert animal.recalls["animal_0"] == 0


def test_a_dictionary_without_parents_splits_them(world, splits):
    levels, concepts = measure_absorption(world, splitting(), splits[:1])
    assert levels[0].split_latents == 3
    assert levels[0].main_f1 > 0.99
    assert levels[0].full == 0
    assert levels[0].child_recall == pytest.approx(1 / 3, abs=0.01)
    assert all(sorted(item.main) == [3 * n, 3 * n + 1, 3 * n + 2] for n, item in enumerate(concepts))


@pytest.mark.parametrize(
    ("latents", "projections", "full", "fraction"),
    [
        ([1.0, 0, 0], [1.0, 0, 0], 0.0, 0.0),  # the main latent does it all
        ([0, 1.0, 0], [0, 1.0, 0], 1.0, 1.0),  # another does it all
        ([0, 1.0, 0], [0, 0.3, 0], 0.0, 0.0),  # another does too little
        ([0.5, 1.0, 0], [0.5, 0.5, 0], 0.0, 0.5),  # half and half: not full, for the main latent fires
        ([0.9, 1.0, 0], [0.9, 0.9, 0], 0.0, 0.1),  # another is counted only for what is missing
        ([0, 0, 1.0], [0, 0, 1.0], 0.0, 0.0),  # a latent whose direction is not the concept's
    ],
)
def test_absorption_of_one_token(latents, projections, full, fraction):
    found = absorption_of(
        torch.tensor([latents]), torch.tensor([projections]), torch.ones(1), torch.tensor([1.0, 0.5, 0.01]), [0]
    )
    assert found == pytest.approx((full, fraction))


def test_concepts_that_cannot_be_probed_are_refused(world):
    noise = LabelledActivations(
        torch.randn(world.x.shape), world.labels, world.names, world.document_of, "noise", world.parents
    )
    split = make_split(noise, 0)
    chosen, refused = choose_concepts(noise, split)
    assert len(chosen) + refused == 3
    assert refused >= 2
    if not chosen:
        assert measure_absorption(noise, faithful(), [split]) == ([], [])


@pytest.mark.parametrize(("smallest", "is_enough"), [(44, False), (45, True)])
def test_a_pair_needs_fifteen_of_each_kind_to_test_on(smallest, is_enough):
    """A third of each kind is tested on: examples with both concepts, with either one and with neither."""
    labels = torch.tensor([[1, 1]] * smallest + [[1, 0]] * 60 + [[0, 1]] * 60 + [[0, 0]] * 60).bool()
    x, documents = torch.randn(len(labels), 4), torch.arange(len(labels))
    pairs = draw_pairs(LabelledActivations(x, labels, ["a", "b"], documents, "two concepts"), seed=0)
    assert len(pairs) == (2 if is_enough else 0)
    for pair in pairs:
        assert pair.test.rows.shape == (1, 60)
        assert labels[pair.test.rows[0]].float().mean(0).tolist() == [0.5, 0.5]


def test_too_few_examples_are_refused_in_words(world):
    few = LabelledActivations(world.x[:60], world.labels[:60], world.names, world.document_of[:60], "sixty tokens")
    with pytest.raises(ValueError, match="sixty tokens: no concept has 20 examples"):
        make_split(few, 0)


@pytest.fixture(scope="module")
def flat_world() -> LabelledActivations:
    """Four classes that exclude each other, each on a direction of its own."""
    generator = torch.Generator().manual_seed(1)
    labels = one_hot(torch.randint(4, (4000,), generator=generator), 4).bool()
    x = torch.cat([labels.float(), torch.zeros(4000, 12)], 1)
    x += NOISE * torch.randn(x.shape, generator=generator)
    return LabelledActivations(x, labels, ["a", "b", "c", "d"], torch.arange(4000) // 20, "four classes")


def test_ablating_a_class_blinds_its_probe_and_no_other(flat_world):
    """TPP on planted probes: without its direction a class cannot be told, which leaves half of the answers right."""
    rows = torch.eye(16)[:5]
    found = measure_perturbation(flat_world, build(rows, rows, [2, 5]), [make_split(flat_world, 0)], counts=[1])
    narrow, whole = found
    assert (whole.prefix, whole.count, whole.classes) == (5, 1, 4)
    assert whole.intended == pytest.approx(0.5, abs=0.02)
    assert whole.unintended < 0.02
    assert whole.score == pytest.approx(whole.intended - whole.unintended)
    # Two of the four classes have no latent in the first prefix.
    assert narrow.intended == pytest.approx(0.25, abs=0.02)


def test_a_dictionary_that_mixes_classes_scores_lower(flat_world):
    split = make_split(flat_world, 0)
    mixed = torch.zeros(4, 16)
    mixed[:, :4] = 0.5
    (score,) = measure_perturbation(flat_world, build(torch.eye(16)[:4], mixed, [4]), [split], counts=[1])
    assert score.score < 0.25
    shuffled = torch.eye(16)[[1, 2, 3, 0]]  # every latent writes another class
    (wrong,) = measure_perturbation(flat_world, build(torch.eye(16)[:4], shuffled, [4]), [split], counts=[1])
    assert wrong.intended < 0.02


def documents_of_facts(two_faint: bool = False) -> LabelledActivations:
    """Two independent facts of each document, one faint (dimension 0) and one plain (dimension 1 where it holds, 2
    where it does not), or one more that is faint (dimension 3); an example is the mean of three tokens.
    """
    generator = torch.Generator().manual_seed(5)
    facts = torch.randint(2, (900, 3 if two_faint else 2), generator=generator).bool()
    tokens = torch.repeat_interleave(facts.float(), 3, 0)
    faint, plain = 0.7 * tokens[:, :1] - 0.35, tokens[:, 1:2]
    more = 0.7 * tokens[:, 2:] - 0.35
    x = torch.cat([faint, plain, 1 - plain, more, torch.zeros(2700, 13 - more.shape[1])], 1)
    noise = torch.randn(x.shape, generator=generator)
    x += noise * torch.tensor([0.5] + [0.1] * 15)
    examples = torch.arange(900)
    names = ["faint", "plain", "other"][: facts.shape[1]]
    return LabelledActivations(x, facts, names, examples, "facts", example_of=torch.repeat_interleave(examples, 3))


def test_removing_the_spurious_fact_mends_the_biased_probe():
    data = documents_of_facts()
    rows = torch.eye(16)[[1, 2, 3]]
    scores, left_out = measure_removal(data, build(rows, rows, [1, 3]), [0, 1], counts=[2])
    # The plain fact is read off its own directions however its probe is trained, so only the other pair is biased.
    assert left_out == 1
    assert {s.pairs for s in scores} == {1}
    found = {(s.prefix, s.split): s for s in scores}
    for seed in (0, 1):
        mended, half = found[3, seed], found[1, seed]
        assert mended.biased < mended.balanced - 0.1
        assert mended.score == pytest.approx((mended.ablated - mended.biased) / (mended.balanced - mended.biased))
        assert mended.score > 0.7
        assert half.score < mended.score


def test_what_is_removed_is_a_mean_over_pairs():
    """Each pair's share lies about that of the mean accuracies, however many pairs there are."""
    rows = torch.eye(16)[[1, 2, 3]]
    ((score,), _) = measure_removal(documents_of_facts(two_faint=True), build(rows, rows, [3]), [0], counts=[2])
    assert score.pairs > 1
    assert score.biased < score.ablated <= score.balanced + 0.05
    assert score.score == pytest.approx((score.ablated - score.biased) / (score.balanced - score.biased), abs=0.2)


def test_features_of_documents_are_means_over_their_tokens():
    data = documents_of_facts()
    expected = data.x.view(900, 3, 16).mean(1)
    assert torch.allclose(data.raw, expected, atol=1e-6)
    columns = torch.tensor([3, 1])
    assert torch.allclose(data.features(lambda x: x, 100, columns), expected[:, columns], atol=1e-6)
    assert torch.allclose(data.features_of(lambda x: x, torch.tensor([7, 2])), expected[[7, 2]], atol=1e-6)
    examples = torch.zeros(900, dtype=torch.bool)
    examples[:500] = True
    with_it, without_it = data.class_means(lambda x: x, 101, examples)
    has = data.labels[:500].any(1)
    for concept in range(2):
        positive = data.labels[:500, concept]
        assert torch.allclose(with_it[concept].float(), expected[:500][positive].mean(0), atol=1e-4)
        assert torch.allclose(without_it[concept].float(), expected[:500][has & ~positive].mean(0), atol=1e-4)
