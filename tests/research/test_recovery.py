"""Recovery of known features, against SAEs that are built to be perfect, to absorb, to hedge."""

import itertools
import math
from importlib.util import find_spec

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.research.recovery import assign, measure_recovery, truth_cosines
from hf_msae.research.toys import TOYS, FeatureWorld, Forest, Node, Samples, group

WORLD = FeatureWorld(
    Forest((group("p", 0.4, (0.3, 0.2), exclusive=True), group("q", 0.3, (0.5,), exclusive=False), Node("s", 0.2))),
    12,
)
PARENTS = [WORLD.forest.names.index(name) for name in ("p", "q")]
EDGES = WORLD.forest.edges


@pytest.fixture(scope="module")
def samples() -> Samples:
    return WORLD.sample(20_000, torch.Generator().manual_seed(0))


def build(encoder: torch.Tensor, decoder: torch.Tensor, bias: float = 0.0) -> MatryoshkaSAE:
    """A ReLU SAE with these rows, decoder rows made unit vectors."""
    config = MatryoshkaSAEConfig(
        hidden_size=decoder.shape[1], num_latents=len(decoder), prefix_sizes=[len(decoder)], k=1, activation="relu"
    )
    sae = MatryoshkaSAE(config).eval()
    with torch.no_grad():
        sae.W_enc.copy_(encoder)
        sae.W_dec.copy_(torch.nn.functional.normalize(decoder, dim=-1))
        sae.b_enc.fill_(bias)
    return sae


def build_perfect() -> MatryoshkaSAE:
    # An encoder 1.01 times too long and a bias of -0.01 keep rounding from firing latents.
    return build(1.01 * WORLD.directions, WORLD.directions, bias=-0.01)


def build_absorbing() -> MatryoshkaSAE:
    """A parent's encoder is silenced by its children, whose decoders hold it too."""
    encoder, decoder = WORLD.directions.clone(), WORLD.directions.clone()
    for parent, child in EDGES:
        encoder[parent] -= 2 * WORLD.directions[child]
        decoder[child] += WORLD.directions[parent]
    return build(encoder, decoder, bias=-0.01)


def build_hedging(share: float) -> MatryoshkaSAE:
    """A share of every child in its parent's encoder and decoder."""
    rows = WORLD.directions.clone()
    for parent, child in EDGES:
        rows[parent] += share * WORLD.directions[child]
    return build(rows, rows, bias=-0.01)


def measure(sae: MatryoshkaSAE, samples: Samples):
    return measure_recovery(sae, WORLD.forest, WORLD.directions, samples)


def test_a_perfect_sae_scores_one(samples):
    recovery = measure(build_perfect(), samples)
    for value in (
        recovery.matched_cosine,
        recovery.worst_cosine,
        recovery.max_cosine,
        recovery.found,
        recovery.recall,
        recovery.parent_recall_alone,
        recovery.parent_recall_with_child,
        recovery.parent_strength_ratio,
        recovery.order,
        recovery.fve,
    ):
        assert value == pytest.approx(1, abs=1e-5)
    for mixing in (recovery.decoder, recovery.encoder):
        assert mixing.parent_to_child == pytest.approx(0, abs=1e-6)
        assert mixing.child_to_parent == pytest.approx(0, abs=1e-6)
        assert mixing.child_to_sibling == pytest.approx(0, abs=1e-6)
    assert recovery.latents == list(range(WORLD.num_features))
    assert recovery.l0 == pytest.approx(recovery.true_l0)
    assert recovery.true_l0 == pytest.approx(WORLD.forest.l0, abs=0.03)


def test_planted_absorption_is_what_is_measured(samples):
    recovery = measure(build_absorbing(), samples)
    assert recovery.parent_recall_alone == 1
    assert recovery.parent_recall_with_child == 0
    assert recovery.parent_strength_ratio == 0
    half = 1 / math.sqrt(2)
    assert recovery.decoder.child_to_parent == pytest.approx(half, abs=1e-6)
    assert recovery.decoder.parent_to_child == pytest.approx(0, abs=1e-6)
    # Parent p takes -2 of each of two children, a row of norm 3; q of one, of norm √5. Averaged over the three edges.
    assert recovery.encoder.parent_to_child == pytest.approx((2 * -2 / 3 - 2 / math.sqrt(5)) / 3, abs=1e-6)
    assert recovery.encoder.child_to_parent == pytest.approx(0, abs=1e-6)
    children = len(EDGES)
    expected = (children * half + WORLD.num_features - children) / WORLD.num_features
    assert recovery.matched_cosine == pytest.approx(expected, abs=1e-6)
    assert recovery.found == pytest.approx(1 - children / WORLD.num_features)


def test_partial_absorption_is_the_share_of_samples_it_silences(samples):
    """One of p's two children, and no child of q, silences its parent."""
    encoder = WORLD.directions.clone()
    p, child = EDGES[0]
    encoder[p] -= 2 * WORLD.directions[child]
    recovery = measure(build(encoder, WORLD.directions, bias=-0.01), samples)
    # With a child of p firing, it is this one in 3 of 5 cases.
    assert recovery.parent_recall_with_child == pytest.approx((2 / 5 + 1) / 2, abs=0.02)
    assert recovery.parent_recall_alone == 1


@pytest.mark.parametrize("share", [0.2, -0.3])
def test_planted_hedging_keeps_its_sign(samples, share):
    recovery = measure(build_hedging(share), samples)
    norms = {parent: math.sqrt(1 + len(WORLD.forest.children(parent)) * share**2) for parent in PARENTS}
    expected = sum(share / norms[parent] for parent, _ in EDGES) / len(EDGES)
    assert recovery.decoder.parent_to_child == pytest.approx(expected, abs=1e-6)
    assert recovery.encoder.parent_to_child == pytest.approx(expected, abs=1e-6)
    assert recovery.decoder.child_to_parent == pytest.approx(0, abs=1e-6)
    assert recovery.parent_recall_with_child == 1
    # One child fires beside each parent, so its latent gets 1 + share of what it gets alone, both less the bias.
    assert recovery.parent_strength_ratio == pytest.approx((0.99 + share) / 0.99, abs=1e-4)


@pytest.mark.parametrize("make", [build_perfect, build_absorbing, lambda: build_hedging(0.2)])
def test_the_order_of_latents_changes_only_what_is_about_order(samples, make):
    sae, permutation = make(), torch.randperm(WORLD.num_features, generator=torch.Generator().manual_seed(3))
    before = measure(sae, samples)
    with torch.no_grad():
        for weights in (sae.W_enc, sae.W_dec, sae.b_enc):
            weights.copy_(weights[permutation].clone())
    after = measure(sae, samples)
    assert [permutation[latent].item() for latent in after.latents] == before.latents
    for name in ("matched_cosine", "max_cosine", "recall", "parent_recall_with_child", "parent_strength_ratio", "fve"):
        assert vars(after)[name] == pytest.approx(vars(before)[name], abs=1e-6)
    for kind in ("decoder", "encoder"):
        for name, value in vars(vars(before)[kind]).items():
            assert vars(vars(after)[kind])[name] == pytest.approx(value, abs=1e-6)


def test_order_counts_parents_before_all_their_children(samples):
    sae = build_perfect()
    reverse = list(range(WORLD.num_features))[::-1]
    p, q = PARENTS
    swapped = list(range(WORLD.num_features))
    child = WORLD.forest.children(q)[0]
    swapped[q], swapped[child] = child, q
    for order, expected in ((reverse, 0.0), (swapped, 0.5)):
        shuffled = build(sae.W_enc.data[order], sae.W_dec.data[order], bias=-0.01)
        assert measure(shuffled, samples).order == expected
    assert p == 0


def test_features_without_latents_are_not_recalled(samples):
    """The first three latents only; and latents that all point away from their features."""
    kept = build(1.01 * WORLD.directions[:3], WORLD.directions[:3], bias=-0.01)
    recovery = measure(kept, samples)
    assert sorted(recovery.latents) == [-1] * (WORLD.num_features - 3) + [0, 1, 2]
    assert recovery.matched_cosine == pytest.approx(3 / WORLD.num_features)
    assert recovery.recall == pytest.approx(3 / WORLD.num_features)
    assert recovery.worst_cosine == 0
    assert math.isnan(recovery.decoder.child_to_parent)  # no child has a latent
    opposite = measure(build(-WORLD.directions, -WORLD.directions), samples)
    assert opposite.matched_cosine == pytest.approx(0, abs=1e-6)
    assert (opposite.recall, opposite.order, opposite.found) == (0, 0, 0)


def test_interfering_directions_do_not_count_as_mixing():
    forest = TOYS["random"](0).world.forest
    world = FeatureWorld(forest, 10, orthogonal=False)
    sae = build(world.directions, world.directions)
    recovery = measure_recovery(sae, forest, world.directions, world.sample(2_000))
    assert recovery.decoder.parent_to_child == pytest.approx(0, abs=1e-6)
    assert recovery.decoder.child_to_sibling == pytest.approx(0, abs=1e-6)


def test_random_rows_are_no_recovery(samples):
    """A failing control: what chance gives in 12 dimensions."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(WORLD.num_features, 12, generator=generator)
    recovery = measure(build(rows, rows), samples)
    assert recovery.matched_cosine < 0.6
    assert recovery.found == 0
    assert recovery.parent_recall_with_child < 0.6


def test_sizes_must_agree(samples):
    with pytest.raises(ValueError, match=r"directions must be \(6, 12\).*got \(5, 12\)"):
        measure_recovery(build_perfect(), WORLD.forest, WORLD.directions[:5], samples)


def test_cosines():
    rows = torch.tensor([[2.0, 0.0], [0.0, 0.0], [-3.0, 4.0]])
    cosines = truth_cosines(rows, torch.eye(2))
    torch.testing.assert_close(cosines, torch.tensor([[1.0, 0.0, -0.6], [0.0, 0.0, 0.8]]).double())


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 5), (5, 3)])
def test_assignment_is_the_best_of_all(shape):
    rows, columns = shape
    for seed in range(20):
        scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        scores = scores.round(decimals=seed % 3)  # with ties, too
        chosen = assign(scores)
        used = chosen[chosen >= 0].tolist()
        assert len(set(used)) == len(used) == min(shape)
        total = sum(scores[row, column].item() for row, column in enumerate(chosen.tolist()) if column >= 0)
        wide = scores if rows <= columns else scores.T
        best = max(
            sum(wide[i, column].item() for i, column in enumerate(places))
            for places in itertools.permutations(range(max(shape)), min(shape))
        )
        assert total == pytest.approx(best)


@pytest.mark.skipif(find_spec("scipy") is None, reason="scipy is not installed")
def test_assignment_agrees_with_scipy():
    from scipy.optimize import linear_sum_assignment

    scores = torch.randn(60, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    assert assign(scores).tolist() == columns.tolist()
    assert rows.tolist() == list(range(60))


def test_assignment_refuses_what_is_not_a_matrix_of_numbers():
    with pytest.raises(ValueError, match="finite scores"):
        assign(torch.tensor([[math.nan]]))
