"""Rank tests of sparse values are those of dense ones, and their p-values are what permutations give."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_msae.corpora.rank_tests import Values, benjamini_hochberg, rank_tests


def sparse(dense: torch.Tensor) -> Values:
    """Values of documents (num_documents, num_latents), without their zeros."""
    documents, latents = dense.nonzero(as_tuple=True)
    return Values(len(dense), latents, dense[documents, latents])


sides = st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=2, max_size=9)


@given(sides, sides)
def test_delta_counts_pairs(a, b):
    a, b = torch.tensor(a).float(), torch.tensor(b).float()
    found = rank_tests(sparse(a), sparse(b), 3, min_firing=1)
    pairs = (b[None] > a[:, None]).double().mean((0, 1)) - (b[None] < a[:, None]).double().mean((0, 1))
    torch.testing.assert_close(found.delta, pairs)
    turned = rank_tests(sparse(b), sparse(a), 3, min_firing=1)
    torch.testing.assert_close(turned.delta, -found.delta)
    torch.testing.assert_close(turned.p, found.p)
    assert ((found.p > 0) & (found.p <= 1)).all()
    both = torch.cat([a, b])
    # A value that all documents share tells nothing.
    assert torch.equal(found.tested, (both != both[0]).any(0))


def test_p_is_the_normal_one_where_the_sides_are_equal():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(60, 40, generator=generator).mul(9).floor()
    b = torch.rand(60, 40, generator=generator).mul(9).add(torch.arange(40) / 20).floor()
    found = rank_tests(sparse(a), sparse(b), 40)
    for latent in range(40):
        sides = (side[:, latent].double().numpy() for side in (b, a))
        theirs = stats.mannwhitneyu(*sides, method="asymptotic").pvalue
        assert found.p[latent].item() == pytest.approx(theirs, rel=1e-6)


def test_p_is_what_permutations_give_where_one_side_is_small():
    """A latent that fires in 10 of 1,050 documents, in three or four of the 50 of B: a normal tail is far off."""
    generator = torch.Generator().manual_seed(0)
    values = torch.zeros(1050)
    values[:10] = 1 + torch.rand(10, generator=generator)
    ranks = values.argsort().argsort().double()
    ranks[10:] = ranks[10:].mean()
    draws = [torch.rand(10_000, 1050, generator=generator).topk(50, dim=1).indices for _ in range(4)]
    sums = ranks[torch.cat(draws)].sum(1) - 50 * ranks.mean()
    variance = 1000 * 50 / (1050 * 1049) * (ranks - ranks.mean()).square().sum()
    for inside in (3, 4):
        # The middle ones of those that fire, and some of the others.
        mask = torch.zeros(1050, dtype=torch.bool)
        mask[3 : 3 + inside] = mask[10 : 60 - inside] = True
        found = rank_tests(sparse(values[~mask, None]), sparse(values[mask, None]), 1)
        above = ranks[mask].sum() - 50 * ranks.mean()
        exact = 2 * (sums >= above - 1e-9).double().mean().item()
        assert exact > 0
        assert found.p.item() == pytest.approx(exact, rel=0.6)
        assert math.erfc(above / math.sqrt(2 * variance)) < exact / 20


def test_chance_alone_finds_nothing():
    """Under the null, p-values are spread evenly, or larger, and findings are rarer than the rate that is held."""
    generator = torch.Generator().manual_seed(1)
    small, with_findings = 0, 0
    for _ in range(40):
        dense = torch.rand(180, 60, generator=generator)
        rates = torch.linspace(0.02, 0.9, 60)
        dense = torch.where(torch.rand(180, 60, generator=generator) < rates, dense, 0.0)
        found = rank_tests(sparse(dense[:150]), sparse(dense[150:]), 60)
        small += int((found.p[found.tested] <= 0.05).sum())
        with_findings += bool((found.q <= 0.05).any())
    assert 0.035 < small / (40 * 60) < 0.055
    assert with_findings <= 5


@given(st.lists(st.floats(1e-12, 1), min_size=1, max_size=20))
def test_the_false_discovery_rate_is_held_by_the_step_up_rule(p):
    q = benjamini_hochberg(torch.tensor(p, dtype=torch.float64))
    for rate in (0.01, 0.05, 0.3):
        ordered = sorted(p)
        most = max((rank for rank, value in enumerate(ordered, 1) if value <= rate * rank / len(p)), default=0)
        bound = ordered[most - 1] if most else -1.0
        near = [abs(value - rate * rank / len(p)) < 1e-9 for rank, value in enumerate(ordered, 1)]
        if not any(near):
            assert (q <= rate).tolist() == [value <= bound for value in p]


def test_what_fires_too_rarely_or_always_the_same_is_not_tested():
    a, b = torch.ones(20, 3), torch.ones(20, 3)
    a[:, 1] = 0
    b[:, 2] = 0
    a[9:, 2] = 0
    found = rank_tests(sparse(a), sparse(b), 4)
    assert found.tested.tolist() == [False, True, False, False]
    assert found.p[[0, 2, 3]].tolist() == found.q[[0, 2, 3]].tolist() == [1, 1, 1]
    assert found.delta.tolist() == [0, 1, -0.45, 0]
    assert found.p[1] < 1e-6
