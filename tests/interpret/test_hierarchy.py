"""Counting pairs, and finding a hierarchy that is known."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hf_msae.modeling.sparse_encoder import ActiveLatents
from hypothesis import given
from hypothesis import strategies as st

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.interpret.cofiring import Cofirings
from hf_msae.interpret.edges import filter_edges, find_candidates, find_hierarchy
from hf_msae.interpret.hierarchy import Edge, Hierarchy, HierarchySettings
from hf_msae.interpret.scan import Firings, scan


def firings_of(dense: torch.Tensor, width: int = 4) -> Firings:
    """The record of dense latent activations (tokens, latents), each worth its square, with an energy of 10 each."""
    tokens, latents = dense.nonzero(as_tuple=True)
    values = dense[tokens, latents]
    return Firings(
        ActiveLatents(tokens, latents, values),
        values.square(),
        torch.full((len(dense),), 10.0),
        torch.zeros(dense.shape[1], width),
    )


@pytest.fixture
def dense() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(300, 20, generator=generator) * (torch.rand(300, 20, generator=generator) < 0.2)


def test_counts_equal_the_product_of_matrices(dense):
    fires = (dense > 0).long()
    expected = fires.T @ fires
    blocks = list(Cofirings(firings_of(dense), 20).counts(range(8, 20), 8))
    assert torch.equal(torch.cat([counts for _, counts in blocks]), expected[8:20, :8])


def test_counts_do_not_depend_on_the_blocks(dense, monkeypatch):
    whole = torch.cat([counts for _, counts in Cofirings(firings_of(dense), 20).counts(range(8, 20), 8)])
    monkeypatch.setattr("hf_msae.interpret.cofiring.COUNTS_AT_ONCE", 16)
    monkeypatch.setattr("hf_msae.interpret.cofiring.PAIRS_AT_ONCE", 20)
    blocks = list(Cofirings(firings_of(dense), 20).counts(range(8, 20), 8))
    assert [(block.start, block.stop) for block, _ in blocks] == [(low, low + 2) for low in range(8, 20, 2)]
    assert torch.equal(torch.cat([counts for _, counts in blocks]), whole)


def test_sums_equal_those_over_the_shared_tokens(dense):
    first, second = torch.tensor([0, 3, 0, 5, 3, 17]), torch.tensor([9, 17, 12, 9, 17, 3])
    sums = Cofirings(firings_of(dense), 20).sums(first, second)
    for index, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        shared = (dense[:, a] > 0) & (dense[:, b] > 0)
        values = dense[shared].double()
        assert sums.count[index] == shared.sum() > 0
        assert sums.activation[index].item() == pytest.approx(values[:, a].sum().item())
        assert sums.gain_of_first[index].item() == pytest.approx(values[:, a].square().sum().item())
        assert sums.gain_of_second[index].item() == pytest.approx(values[:, b].square().sum().item())
        assert sums.energy[index].item() == 10 * shared.sum()


def test_a_known_hierarchy_is_found_whole_and_nothing_else(known):
    found = scan(known.model, known.tokenizer, known.sae, known.texts, max_tokens=10**6, packing=False)
    hierarchy = find_hierarchy(known.sae, found.firings)
    birds, fish = {(4, latent) for latent in (6, 7, 8)}, {(5, latent) for latent in (9, 10, 11)}
    animals = {(0, latent) for latent in (4, 5, 6, 7, 8, 9, 10, 11)}
    assert {(edge.parent, edge.child) for edge in hierarchy.edges} == birds | fish | animals
    for edge in hierarchy.edges:
        assert edge.coverage == edge.score == 1.0
        assert edge.lift == pytest.approx(1 / edge.parent_firing_rate)
        assert edge.strength == pytest.approx(1.0)
        assert edge.parent_gain > edge.child_gain > 0
    assert hierarchy.roots() == [0]
    assert hierarchy.descendants()[0] == {*range(4, 12)}
    # The latent of every word covers all others, and by chance alone it would.
    assert hierarchy.survivors["coverage"] - hierarchy.survivors["score"] == 14
    assert hierarchy.super_parents == [0]
    assert [edge.parent for edge in hierarchy.parents(7)] == [0, 4]
    assert {edge.child for edge in hierarchy.children(5)} == {9, 10, 11}


def test_use_is_what_the_latent_adds_to_the_energy(known):
    found = scan(known.model, known.tokenizer, known.sae, known.texts, max_tokens=10**6, packing=False)
    edges = {(edge.parent, edge.child): edge for edge in find_hierarchy(known.sae, found.firings).edges}
    # Directions do not overlap and nothing is left over, so each is worth its square: 1, 0.25, 0.64, 0.36 of 2.25.
    assert edges[0, 6].parent_gain == pytest.approx(1 / 2.25)
    assert edges[4, 6].parent_gain == pytest.approx(0.64 / 2.25)
    assert edges[4, 6].child_gain == pytest.approx(0.36 / 2.25)
    # On a bird, what the animal latent and the bird's have left: directions of lengths 1 and 0.8.
    assert edges[0, 4].residual == pytest.approx(1 / math.hypot(1, 0.8))


def test_independent_latents_have_no_edges():
    generator = torch.Generator().manual_seed(1)
    dense = (torch.rand(4000, 60, generator=generator) < torch.linspace(0.05, 0.6, 60)).float()
    dense[:, 0] = 1.0  # fires on every token
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=4, num_latents=60, prefix_sizes=[20, 60], k=4)).eval()
    settings = HierarchySettings(min_coverage=0.0, min_score=0.0)
    candidates = find_candidates(sae, firings_of(dense), settings)
    significant = filter_edges(candidates, settings)["chance"]
    assert candidates.num_eligible == 20 * 40
    # At most a hundredth of what is found may be false, and all of it is.
    assert sum(significant) <= 1
    assert find_hierarchy(sae, firings_of(dense)).edges == []


def test_p_values_are_uniform_where_nothing_is_related():
    generator = torch.Generator().manual_seed(2)
    dense = (torch.rand(20_000, 80, generator=generator) < 0.2).float()
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=4, num_latents=80, prefix_sizes=[40, 80], k=4)).eval()
    edges = find_candidates(sae, firings_of(dense), HierarchySettings(min_coverage=0.0)).edges
    values = torch.tensor([edge.p_value for edge in edges]).sort().values
    assert len(values) == 1600
    gap = (values - (torch.arange(1600) + 0.5) / 1600).abs().max().item()
    assert gap < 1.63 / 1600**0.5  # Kolmogorov and Smirnov, at 1%


def test_a_weak_firing_on_the_side_is_no_parent():
    """Latent 0 fires on all of the child's tokens, but at a tenth of its strength elsewhere; latent 1 at full."""
    dense = torch.zeros(1000, 4)
    dense[:100, 3] = 0.5
    dense[:100, 0], dense[100:200, 0] = 1.0, 10.0
    dense[:200, 1] = 2.0
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=4, num_latents=4, prefix_sizes=[2, 4], k=2)).eval()
    settings = HierarchySettings(residual_quantile=0.0)
    strengths = {edge.parent: edge.strength for edge in find_candidates(sae, firings_of(dense), settings).edges}
    # Weighed by itself, the mean of as many 1s as 10s is 101 / 11.
    assert strengths == pytest.approx({0: 11 / 101, 1: 1.0})
    hierarchy = find_hierarchy(sae, firings_of(dense), settings)
    assert hierarchy.survivors["order"] == 2
    assert hierarchy.survivors["strength"] == 1


def edge(parent: int, child: int, score: float, shared: int = 50) -> Edge:
    return Edge(parent, child, shared, 0.9, 0.1, 9.0, 3.0, 0.001, score, 0.2, 0.1, 1.1, 0.7)


def make_hierarchy() -> Hierarchy:
    edges = [edge(0, 2, 0.9), edge(1, 2, 0.8), edge(2, 5, 0.7), edge(0, 5, 0.6)]
    return Hierarchy(edges, [2, 4, 6], [9] * 6, 1000, {"eligible": 12, "residual": 4}, 0.25, [])


def test_json_is_read_back_as_it_was_written(tmp_path):
    hierarchy = make_hierarchy()
    assert Hierarchy.from_json(hierarchy.to_json()) == hierarchy
    hierarchy.save(tmp_path / "h.json")
    assert Hierarchy.from_json((tmp_path / "h.json").read_text()) == hierarchy
    for text in ("[]", "{", json.dumps({"edges": []})):
        with pytest.raises(ValueError, match="no hierarchy as"):
            Hierarchy.from_json(text)


def test_graphviz_has_every_edge_and_every_name(tmp_path):
    text = make_hierarchy().to_graphviz({0: 'says "owl"', 2: "bird"})
    assert text.startswith("digraph hierarchy {")
    assert '0 [label="0\\nsays \\"owl\\""];' in text
    assert '5 [label="5"];' in text
    assert [line.split(" [")[0].strip() for line in text.splitlines() if "->" in line] == [
        "0 -> 2",
        "1 -> 2",
        "2 -> 5",
        "0 -> 5",
    ]
    assert text.count("rank=same") == 3
    make_hierarchy().save(tmp_path / "h.dot")
    assert "0 -> 5" in (tmp_path / "h.dot").read_text()


def test_a_graph_with_several_parents_is_walked_whole():
    hierarchy = make_hierarchy()
    assert hierarchy.descendants() == {0: {2, 5}, 1: {2, 5}, 2: {5}}
    assert hierarchy.roots() == [0, 1]
    assert [hierarchy.level(latent) for latent in (0, 2, 5)] == [0, 1, 2]
    strong = hierarchy.at_least(0.75)
    assert [(e.parent, e.child) for e in strong.edges] == [(0, 2), (1, 2)]
    assert replace(strong, edges=hierarchy.edges) == hierarchy


@given(st.sets(st.tuples(st.integers(0, 8), st.integers(0, 8)).filter(lambda pair: pair[0] < pair[1])))
def test_the_reduced_graph_reaches_the_same_with_no_edge_to_spare(pairs):
    whole = Hierarchy([edge(*pair, 0.5) for pair in pairs], [3, 6, 9], [90] * 9, 1000, {}, 0.0, [])
    reduced = whole.reduced()
    assert reduced.descendants() == whole.descendants()
    for left_out in reduced.edges:
        fewer = replace(reduced, edges=[other for other in reduced.edges if other is not left_out])
        assert fewer.descendants() != whole.descendants()


def test_roots_that_a_few_kinds_make_up_come_first():
    many = [edge(0, child, 0.9, shared=10) for child in range(3, 20)]
    kinds = [edge(1, 20, 0.6, shared=30), edge(1, 21, 0.5, shared=40)]
    contexts = [edge(2, 22, 0.9, shared=40), edge(2, 23, 0.9, shared=35)]
    hierarchy = Hierarchy(many + kinds + contexts, [3, 24], [100] * 24, 1000, {}, 0.0, [])
    # Of latent 0, the five largest children make up 0.5; of 1, both 0.7; of 2, both 0.75.
    assert hierarchy.roots() == [2, 1, 0]
    names = [f"w{latent}" for latent in range(24)]
    # Two contexts of one word are one kind, which makes up 0.4.
    names[22], names[23] = "the, a", "The"
    assert hierarchy.roots(names) == [1, 0, 2]
    # Contexts of the root's own word are none.
    names[1], names[20], names[21] = "owl, robin", "Owl", "owl"
    assert hierarchy.roots(names) == [0, 2, 1]
    # Function words and punctuation come last, whatever their children make up.
    names[22], names[23] = "wing", "beak"
    assert hierarchy.roots(names) == [2, 0, 1]
    names[0], names[2] = " and, or", ".,"
    assert hierarchy.roots(names) == [1, 2, 0]
    assert [edge.child for edge in hierarchy.children(1)] == [21, 20]
    assert hierarchy.share(hierarchy.children(1)[0]) == 0.4


def test_splits_are_parts_of_their_parent_and_named_like_it():
    names = ["owl, robin", "x", "y", "Owl", "owl, wing", "duck", "owl"]
    found = [edge(0, 3, 0.9), edge(0, 4, 0.9), edge(0, 5, 0.9), replace(edge(0, 6, 0.9), coverage=0.8)]
    found = [replace(one, coverage=0.95) if one.child < 6 else one for one in found]
    hierarchy = Hierarchy(found, [3, 7], [100, 9, 9, 50, 51, 20, 20], 1000, {}, 0.0, [])
    # The second fires on more than half as many tokens, the third has another name, the last fires elsewhere, too.
    assert [hierarchy.is_split(one, names) for one in found] == [True, False, False, False]


def test_what_has_no_hierarchy_is_refused(known):
    flat = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=4, num_latents=6, prefix_sizes=[6], k=2)).eval()
    with pytest.raises(ValueError, match="at least two levels; this SAE has one, of 6 latents"):
        find_hierarchy(flat, firings_of(torch.ones(5, 6)))
    unread = scan(known.model, known.tokenizer, known.sae, known.texts, max_tokens=50, record_tokens=0)
    with pytest.raises(ValueError, match="record_tokens above 0"):
        find_hierarchy(known.sae, unread.firings)
    with pytest.raises(ValueError, match=r"min_score must be between 0 and 1, got 1\.5"):
        HierarchySettings(min_score=1.5)


def test_the_files_keep_the_keys_that_they_have_always_had():
    edge = Edge(0, 5, 40, 0.9, 0.2, 4.5, 2.0, 0.001, 0.87, 0.3, 0.1, 1.1, 0.6)
    found = Hierarchy([edge], [4, 8], [50] * 8, 200, {"eligible": 1}, 0.1, [], HierarchySettings(min_gain=0.05))
    values = json.loads(found.to_json())
    assert list(values["edges"][0]) == [
        "parent", "child", "shared", "coverage", "base_rate", "lift", "log_odds", "p_value", "score", "parent_use",
        "child_use", "strength", "residual",
    ]  # fmt: skip
    assert [values["edges"][0][key] for key in ("base_rate", "parent_use", "child_use")] == [0.2, 0.3, 0.1]
    assert values["settings"]["min_use"] == 0.05
    assert Hierarchy.from_json(found.to_json()) == found
