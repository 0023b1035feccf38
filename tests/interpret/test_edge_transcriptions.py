"""Every number of an edge once more, from dense firings in plain loops; and how chance is bounded, against scipy."""

import math

import pytest
import torch
from hf_msae.modeling.sparse_encoder import ActiveLatents
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.interpret import edges as edges_module
from hf_msae.interpret.edges import filter_edges, find_candidates, find_hierarchy
from hf_msae.interpret.hierarchy import Edge, Hierarchy, HierarchySettings
from hf_msae.interpret.scan import Firings

SIZES, WIDTH, TOKENS = [4, 9, 16], 5, 250


def random_world(seed: int) -> tuple[MatryoshkaSAE, Firings, torch.Tensor]:
    """An SAE of three levels, its record, and its dense activations (tokens, latents)."""
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(TOKENS, SIZES[-1], generator=generator) < torch.linspace(0.7, 0.1, SIZES[-1])
    dense = fires * (torch.rand(TOKENS, SIZES[-1], generator=generator) + 0.2)
    torch.manual_seed(seed)
    config = MatryoshkaSAEConfig(hidden_size=WIDTH, num_latents=SIZES[-1], prefix_sizes=SIZES, k=4)
    sae = MatryoshkaSAE(config).eval()
    tokens, latents = dense.nonzero(as_tuple=True)
    gains = torch.randn(len(tokens), generator=generator) + 0.3
    energies = torch.rand(TOKENS, generator=generator) + 1
    errors = torch.randn(SIZES[-1], WIDTH, generator=generator)
    active = ActiveLatents(tokens, latents, dense[tokens, latents])
    return sae, Firings(active, gains, energies, errors), dense


LOOSE = HierarchySettings(min_firings=25, min_shared=5, min_coverage=0.2)
# Half of the pairs are none of these.
STRICTER = HierarchySettings(min_firings=25, min_shared=5, min_coverage=0.5)


@pytest.mark.parametrize("seed", range(4))
def test_the_numbers_of_every_edge(seed):
    sae, firings, dense = random_world(seed)
    worth = torch.zeros_like(dense)
    worth[firings.active.tokens, firings.active.latents] = firings.gains
    fires, dense = dense > 0, dense.double()
    found = {(edge.parent, edge.child): edge for edge in find_candidates(sae, firings, LOOSE).edges}
    expected = set()
    for child in range(SIZES[0], SIZES[-1]):
        for parent in range(max(size for size in SIZES if size <= child)):
            both = fires[:, parent] & fires[:, child]
            shared, of_parent, of_child = int(both.sum()), int(fires[:, parent].sum()), int(fires[:, child].sum())
            if min(of_parent, of_child) < 25 or shared < 5 or shared < 0.2 * of_child:
                continue
            expected.add((parent, child))
            edge, coverage, base = found[parent, child], shared / of_child, of_parent / TOKENS
            odds = (shared + 0.5) * (TOKENS - of_parent - of_child + shared + 0.5)
            odds /= (of_child - shared + 0.5) * (of_parent - shared + 0.5)
            energy = firings.energies[both].double().sum().item()
            typical = (dense[:, parent].square().sum() / dense[:, parent].sum()).item()
            assert edge.shared == shared
            assert edge.coverage == pytest.approx(coverage)
            assert edge.parent_firing_rate == pytest.approx(base)
            assert edge.lift == pytest.approx(coverage / base)
            assert edge.log_odds == pytest.approx(math.log(odds))
            assert edge.score == pytest.approx((coverage - base) / (1 - base))
            assert edge.parent_gain == pytest.approx(worth[both, parent].double().sum().item() / energy)
            assert edge.child_gain == pytest.approx(worth[both, child].double().sum().item() / energy)
            assert edge.strength == pytest.approx(dense[both, parent].sum().item() / shared / typical)
            assert edge.residual == pytest.approx(residual(sae, firings, dense, parent, child))
    assert found.keys() == expected
    assert len(expected) > 30


def residual(sae: MatryoshkaSAE, firings: Firings, dense: torch.Tensor, parent: int, child: int) -> float:
    """The cosine of the parent's row with the mean over the child's tokens of error + parent's part + child's part."""
    of_child = dense[:, child] > 0
    rows = sae.W_dec.detach().double()
    left = firings.error_sums[child].double() / of_child.sum()
    left = left + dense[of_child, parent].mean() * rows[parent] + dense[of_child, child].mean() * rows[child]
    return torch.nn.functional.cosine_similarity(left, rows[parent], dim=0).item()


@pytest.mark.parametrize("seed", range(4))
def test_the_residuals_bar_is_a_quantile_of_shuffled_pairs(seed, monkeypatch):
    """With enough shuffles these are all pairs of a child with a parent of other children in an earlier level."""
    monkeypatch.setattr(edges_module, "SHUFFLES", 3000)
    sae, firings, dense = random_world(seed)
    found = find_candidates(sae, firings, STRICTER)
    own = {(edge.parent, edge.child) for edge in found.edges}
    parents, children = {parent for parent, _ in own}, {child for _, child in own}
    others = [
        (parent, child)
        for parent in parents
        for child in children
        if (parent, child) not in own and any(parent < size <= child for size in SIZES)
    ]
    assert len(others) > 3
    scores = [residual(sae, firings, dense.double(), *pair) for pair in others]
    bar = max(0.0, torch.tensor(scores).double().quantile(STRICTER.residual_quantile).item())
    assert found.residual_threshold == pytest.approx(bar)


def edge_with(p_value: float) -> Edge:
    return Edge(0, 5, 40, 0.9, 0.1, 9.0, 3.0, p_value, 0.8, 0.2, 0.1, 1.1, 0.7)


@given(
    st.lists(st.floats(0, 1) | st.floats(0, 1e-3), min_size=1, max_size=40),
    st.integers(0, 400),
    st.sampled_from([0.01, 0.05, 0.3]),
)
@settings(deadline=None)
def test_false_discoveries_are_bounded_over_all_eligible_pairs(p_values, others, rate):
    """Pairs that were eligible and co-fire too seldom were tests as well; what scipy makes of p-values of 1 for them.
    The order in which edges come must not matter.
    """
    stats = pytest.importorskip("scipy.stats", reason="needs scipy (comes with the extra test)")
    candidates = edges_module.Candidates([edge_with(p) for p in p_values], [], len(p_values) + others, 0, 0.0)
    accepted = filter_edges(candidates, HierarchySettings(false_discovery_rate=rate))["chance"]
    adjusted = stats.false_discovery_control([*p_values, *[1.0] * others])
    for p, ours, theirs in zip(p_values, accepted, adjusted, strict=False):
        if abs(theirs - rate) > 1e-9:  # on the border, rounding decides
            assert ours == (theirs <= rate), p


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.4])
def test_shares_and_super_parents(share):
    sae, firings, dense = random_world(2)
    # No filter but use and order, so that every parent has several children.
    settings = HierarchySettings(25, 5, 0.2, 1.0, 0.0, 0.0, 0.0, 0.0, super_parent_share=share)
    found: Hierarchy = find_hierarchy(sae, firings, settings)
    fires = dense > 0
    children: dict[int, list[int]] = {}
    for edge in found.edges:
        children.setdefault(edge.parent, []).append(edge.child)
        both = (fires[:, edge.parent] & fires[:, edge.child]).sum().item()
        assert found.share(edge) == pytest.approx(both / fires[:, edge.parent].sum().item())
    assert len({len(its) for its in children.values()}) > 1
    expected = []
    for parent, its in sorted(children.items()):
        first_later = next(size for size in SIZES if parent < size)
        possible = [latent for latent in range(first_later, SIZES[-1]) if fires[:, latent].sum() >= 25]
        if len(its) >= share * len(possible):
            expected.append(parent)
    assert found.super_parents == expected
    assert 0 < len(expected) <= len(children)
