"""What is chosen never depends on the examples that it is then judged by.

One metamorphic relation for every metric that chooses: where the test documents' activations become other ones, the
samples, the probes, and which latents were taken stay as they were, and the scores do not.
"""

from dataclasses import replace

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.evaluation.absorption import measure_absorption
from hf_msae.evaluation.erasure import draw_pairs, order_latents, spurious_effects
from hf_msae.evaluation.labelled import LabelledActivations, encoder_of
from hf_msae.evaluation.probes import Split, draw_samples, fit_probes, make_split
from hf_msae.evaluation.probing import KS, choose_features, reference_features

WIDTH, NUM_LATENTS = 16, 48
NAMES = ["root", "other", "root_a", "root_b", "root_c"]
TREE = {"root_a": "root", "root_b": "root", "root_c": "root"}


def tokens() -> LabelledActivations:
    """6,000 tokens whose concepts show in noisy activations, so that many latents are nearly as good as the best."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(4, (6000,), generator=generator)  # three children of the root, or the other concept
    labels = torch.stack([kind < 3, kind == 3, kind == 0, kind == 1, kind == 2], 1)
    directions = torch.randn(5, WIDTH, generator=generator)
    x = labels.float() @ directions + 1.2 * torch.randn(6000, WIDTH, generator=generator)
    return LabelledActivations(x, labels, NAMES, torch.arange(6000) // 30, "noisy tokens", TREE)


def documents() -> LabelledActivations:
    """600 documents of two tokens, with two independent facts."""
    generator = torch.Generator().manual_seed(1)
    facts = torch.randint(2, (600, 2), generator=generator).bool()
    directions = torch.randn(2, WIDTH, generator=generator)
    x = (facts.float() @ directions).repeat_interleave(2, 0) + torch.randn(1200, WIDTH, generator=generator)
    every = torch.arange(600)
    return LabelledActivations(x, facts, ["one", "two"], every, "facts", example_of=every.repeat_interleave(2))


@pytest.fixture(scope="module")
def sae() -> MatryoshkaSAE:
    torch.manual_seed(2)
    config = MatryoshkaSAEConfig(hidden_size=WIDTH, num_latents=NUM_LATENTS, prefix_sizes=[12, NUM_LATENTS], k=12)
    sae = MatryoshkaSAE(config).eval()
    torch.nn.init.normal_(sae.b_enc, std=0.3)
    sae.threshold.fill_(0.2)
    return sae


def judged_by_others(data: LabelledActivations, training_rows: torch.Tensor) -> LabelledActivations:
    """The same labels, but every document without a training example has other activations: large, and those of other
    labels.
    """
    training = torch.isin(data.document_of, data.document_of[training_rows])
    of_token = training if data.example_of is None else training[data.example_of]
    x = data.x.clone()
    strangers = (~of_token).nonzero().flatten()
    x[strangers] = -3 * x[strangers.roll(7)] + 2
    return LabelledActivations(x, data.labels, data.names, data.document_of, "others", data.parents, data.example_of)


def trained_on(split: Split) -> torch.Tensor:
    return split.train.rows[split.train.weights > 0]


@pytest.fixture(scope="module", params=[tokens, documents], ids=["tokens", "documents"])
def pair(request) -> tuple[LabelledActivations, Split, LabelledActivations, Split]:
    """A world and its split, and the same with other test documents."""
    data = request.param()
    split = make_split(data, 0)
    other = judged_by_others(data, trained_on(split))
    return data, split, other, make_split(other, 0)


def test_samples_and_probes_are_the_same_and_scores_are_not(pair):
    _, split, _, other = pair
    for one, two in ((split.train, other.train), (split.test, other.test)):
        assert torch.equal(one.rows, two.rows)
        assert torch.equal(one.weights, two.weights)
    assert torch.equal(split.probes.direction, other.probes.direction)
    assert torch.equal(split.probes.bias, other.probes.bias)
    assert (split.scores.accuracy - other.scores.accuracy).abs().min() > 0.05


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [tokens, documents])
def test_no_document_is_on_both_sides(make, seed):
    data = make()
    train, test = (samples.rows[samples.weights > 0] for samples in draw_samples(data, seed))
    assert not torch.isin(data.document_of[train], data.document_of[test]).any()


def test_main_latents_are_chosen_on_training_examples(sae):
    data = tokens()
    split = make_split(data, 0)
    other_data = judged_by_others(data, trained_on(split))
    # Which concepts are looked at does depend on how well a probe on the whole activation does on test examples.
    other_split = replace(make_split(other_data, 0), scores=split.scores)
    _, found = measure_absorption(data, sae, [split])
    _, others = measure_absorption(other_data, sae, [other_split])
    assert [(item.concept, item.prefix, item.main) for item in found] == [
        (item.concept, item.prefix, item.main) for item in others
    ]
    assert max(len(item.main) for item in found) > 1
    assert all(abs(one.main_f1 - two.main_f1) > 0.02 for one, two in zip(found, others, strict=True))


def test_probed_features_are_chosen_on_training_examples(pair, sae):
    data, split, other_data, other_split = pair
    prefixes = sae.config.prefix_sizes
    chosen, others = (
        choose_features(world, *encoder_of(sae), its_split, prefixes, max(KS))
        for world, its_split in ((data, split), (other_data, other_split))
    )
    for prefix in prefixes:
        assert torch.equal(chosen[prefix], others[prefix])
        assert int(chosen[prefix].max()) < prefix


def test_reference_features_are_made_of_training_examples(pair):
    data, split, other_data, other_split = pair
    ours, theirs = reference_features(data, split), reference_features(other_data, other_split)
    assert ours.keys() == theirs.keys()
    x = torch.randn(5, WIDTH)
    for name in ours:
        assert torch.equal(ours[name](x), theirs[name](x)), name


def test_latents_to_ablate_are_ranked_on_training_examples(pair, sae):
    data, split, other_data, other_split = pair
    classes = list(range(data.num_concepts))
    orders, others = (order_latents(w, sae, s, classes) for w, s in ((data, split), (other_data, other_split)))
    for prefix in sae.config.prefix_sizes:
        assert torch.equal(orders[prefix], others[prefix])


@pytest.mark.parametrize("seed", range(3))
def test_spurious_latents_are_ranked_on_training_documents(sae, seed):
    data = documents()
    pairs = draw_pairs(data, seed)
    assert pairs
    encode, at_once = encoder_of(sae)
    for pair in pairs:
        trained = torch.cat([part.rows.flatten() for part in (pair.biased, pair.balanced, pair.of_spurious)]).unique()
        assert not torch.isin(trained, pair.test.rows).any()
        effects = []
        for world in (data, judged_by_others(data, trained)):
            latents = world.features(encode, at_once).double()
            probe = fit_probes(world.raw, pair.of_spurious)
            effects.append(spurious_effects(latents, sae.W_dec.double(), pair.of_spurious, probe))
        assert torch.equal(*effects)
        assert effects[0].max() > 0
