"""Worlds of known features: their closed forms, and that samples obey them."""

import itertools
import math
from typing import Any

import pytest
import torch
from patience import calls_of

from hf_msae.research.toys import TOYS, FeatureWorld, Forest, Node, group, make_directions, random_forest

pytestmark = pytest.mark.slow

SAMPLES = 200_000


def enumerate_joint(roots: tuple[Node, ...]) -> dict[frozenset[str], float]:
    """Probability of every set of features that can fire together, by trying all outcomes: an independent account of
    what a forest means.
    """

    def outcomes(node: Node) -> list[tuple[frozenset[str], float]]:
        """What can fire in a tree whose root's parent fires."""
        inner = combine([outcomes(child) for child in node.children])
        if node.exclusive:
            # One child's trials or none's: each child's own outcome given that it fires, and its chance.
            inner = [(frozenset(), 1 - sum(child.probability for child in node.children))]
            for child in node.children:
                inner += [(names, p) for names, p in outcomes(child) if child.name in names]
        on = [(names | {node.name}, p * node.probability) for names, p in inner]
        return [(frozenset(), 1 - node.probability), *on]

    def combine(trees: list[list[tuple[frozenset[str], float]]]) -> list[tuple[frozenset[str], float]]:
        return [
            (frozenset().union(*(names for names, _ in choice)), math.prod(p for _, p in choice))
            for choice in itertools.product(*trees)
        ]

    total: dict[frozenset[str], float] = {}
    for names, p in combine([outcomes(root) for root in roots]):
        total[names] = total.get(names, 0.0) + p
    return total


DEEP = (
    Node(
        "a",
        0.5,
        (
            group("a.x", 0.3, (0.5, 0.4), exclusive=True),
            group("a.y", 0.6, (0.2, 0.7), exclusive=False),
        ),
        exclusive=True,
    ),
    Node("b", 0.4, (Node("b.x", 0.5), Node("b.y", 0.25, (Node("b.y.z", 1.0),)))),
    Node("c", 0.1),
)


@pytest.mark.parametrize("roots", [DEEP, random_forest(3, num_roots=2, depth=3, branching=2).roots])
def test_joint_probabilities_are_those_of_all_outcomes(roots):
    forest, outcomes = Forest(roots), enumerate_joint(roots)
    assert sum(outcomes.values()) == pytest.approx(1)
    expected = torch.tensor(
        [[sum(p for names, p in outcomes.items() if {a, b} <= names) for b in forest.names] for a in forest.names],
        dtype=torch.float64,
    )
    torch.testing.assert_close(forest.joint_probabilities, expected)
    torch.testing.assert_close(forest.probabilities, expected.diag())
    assert forest.l0 == pytest.approx(sum(len(names) * p for names, p in outcomes.items()))


@pytest.mark.parametrize("name", TOYS)
def test_samples_have_the_closed_forms(name):
    world = TOYS[name](1).world
    samples = world.sample(SAMPLES, torch.Generator().manual_seed(0))
    fires = (samples.features > 0).double()
    p = world.forest.joint_probabilities
    error = (fires.T @ fires / SAMPLES - p).abs()
    assert (error <= 5 * (p * (1 - p) / SAMPLES).sqrt() + 1e-12).all()  # five standard errors; never where P is 0 or 1
    x = samples.x.double()
    scale = world.covariance.diag().max().item()
    torch.testing.assert_close(x.mean(0), world.mean, atol=5 * math.sqrt(scale / SAMPLES), rtol=0)
    torch.testing.assert_close(torch.cov(x.T), world.covariance, atol=0.02 * scale, rtol=0)


def test_an_activation_is_its_features_times_their_directions():
    quiet = FeatureWorld(Forest(DEEP), 40, magnitude_spread=0.1, sample_spread=0.5)
    samples = quiet.sample(20_001, torch.Generator().manual_seed(0))  # more than two chunks
    torch.testing.assert_close(samples.x, samples.features @ quiet.directions.float())
    strengths = samples.features / quiet.magnitudes.float()
    firing = strengths[strengths > 0]
    assert firing.min() >= 0.5
    assert firing.max() <= 1.5
    assert firing.mean().item() == pytest.approx(1, abs=0.01)
    noisy = FeatureWorld(Forest(DEEP), 40, noise=0.3)
    samples = noisy.sample(20_001, torch.Generator().manual_seed(0))
    rest = samples.x - samples.features @ noisy.directions.float()
    assert rest.std().item() == pytest.approx(0.3, rel=0.01)


def test_a_child_fires_only_with_its_parent_and_never_with_an_exclusive_sibling():
    world = FeatureWorld(Forest(DEEP), 40)
    fires = world.sample(50_000, torch.Generator().manual_seed(0)).features > 0
    for parent, child in world.forest.edges:
        assert not (fires[:, child] & ~fires[:, parent]).any()
    x, y = world.forest.names.index("a.x"), world.forest.names.index("a.y")
    assert fires[:, x].any()
    assert not (fires[:, x] & fires[:, y]).any()


def test_a_seed_repeats_and_another_differs():
    world = TOYS["tree"](0).world
    first, again, other = (world.sample(100, torch.Generator().manual_seed(seed)).x for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(TOYS["tree"](0).world.directions, world.directions)
    assert not torch.allclose(TOYS["tree"](1).world.directions, world.directions)


def test_the_published_toys():
    tree = TOYS["tree"]().world
    assert (tree.num_features, tree.hidden_size) == (20, 20)
    assert tree.forest.l0 == pytest.approx(1.12)
    assert len(tree.forest.edges) == 9
    assert (tree.magnitudes - 1).abs().max() < 0.2
    absorption = TOYS["absorption"]().world
    assert absorption.hidden_size == 50
    torch.testing.assert_close(absorption.forest.probabilities, torch.tensor([0.25, 0.05, 0.05, 0.05]).double())
    hedging = TOYS["hedging"]().world.forest
    torch.testing.assert_close(hedging.probabilities, torch.tensor([0.25, 0.0375, 0.0375, 0.0375]).double())
    assert hedging.joint_probabilities[1, 2].item() == pytest.approx(0.25 * 0.15 * 0.15)
    assert TOYS["parent"]().prefix_sizes == (1, 3)


def test_directions():
    generator = torch.Generator().manual_seed(0)
    rows = make_directions(20, 20, True, generator)
    torch.testing.assert_close(rows @ rows.T, torch.eye(20, dtype=torch.float64))
    rows = make_directions(30, 20, False, generator)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(30, dtype=torch.float64))
    with pytest.raises(ValueError, match="30 features cannot be orthogonal in 20 dimensions"):
        make_directions(30, 20, True, generator)


def test_random_forests_keep_to_what_is_asked():
    options: dict[str, Any] = {"num_roots": 5, "depth": 3, "branching": 4, "branching_share": 1.0}
    forest = random_forest(0, **options, child_probability=(0.4, 0.6), exclusive_share=1.0, magnitude=(2.0, 3.0))
    assert forest.depths.max() == 2
    sizes = {len(forest.children(row)) for row in range(forest.num_features)}
    assert sizes <= {0, 2, 3, 4}
    assert len(sizes) > 2
    assert forest.exclusive[forest.depths > 0].all()
    assert forest.magnitudes.min() >= 2
    assert forest.magnitudes.max() <= 3
    for parent in {parent for parent, _ in forest.edges}:
        assert forest.conditional[forest.children(parent)].sum() <= 1 + 1e-9
    free = random_forest(0, **options, exclusive_share=0.0)
    assert not free.exclusive.any()
    assert random_forest(0, num_roots=4, depth=1).edges == []
    assert random_forest(7).names == random_forest(7).names
    assert not torch.equal(random_forest(7).probabilities[:6], random_forest(8).probabilities[:6])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Node("a", 1.5), "feature 'a' must be in \\(0, 1\\], got 1.5"),
        (lambda: Node("a", 0.5, magnitude=0), "magnitude of feature 'a'"),
        (lambda: group("a", 0.5, (0.6, 0.6), exclusive=True), "sum to at most 1, got 1.2"),
        (lambda: Forest(()), "at least one feature"),
        (lambda: Forest((Node("a", 0.1), Node("a", 0.2))), "a was given more than once"),
        (lambda: FeatureWorld(Forest((Node("a", 0.1),)), 4, noise=-1), "noise must be finite and not negative"),
        (lambda: FeatureWorld(Forest((Node("a", 0.1),)), 4, sample_spread=2), "sample_spread must be in"),
        (lambda: FeatureWorld(Forest((Node("a", 0.1),)), 4, magnitude_spread=2), "magnitude_spread must be in"),
        (lambda: FeatureWorld(Forest((Node("a", 0.1),)), 4).sample(0), "num_samples must be at least 1"),
        (lambda: random_forest(0, depth=0), "depth must be at least 1, got 0"),
        (lambda: random_forest(0, exclusive_share=2), "exclusive_share must be in"),
        (lambda: random_forest(0, child_probability=(0.5, 0.2)), "child_probability must be"),
    ],
)
def test_impossible_worlds_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_million_samples_are_drawn_at_once():
    """Not one by one, nor feature by feature of each."""
    world = TOYS["tree"]().world
    assert world.sample(1_000_000).x.shape == (1_000_000, 20)
    assert calls_of(lambda: world.sample(100_000)) < 1_000
