"""The benchmark of hierarchies judges edges as its docstring says, and runs whole on a small SAE."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.interpret import Edge
from hf_msae.worlds.stories import CONCEPTS

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CONCEPT_OF = {0: "animal", 1: "person", 4: "bird", 5: "owl", 6: "bird", 7: "girl"}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("hierarchy")


def edges(*pairs: tuple[int, int]) -> list[Edge]:
    return [Edge(parent, child, 50, 0.9, 0.1, 9.0, 3.0, 0.001, 0.9, 0.2, 0.1, 1.1, 0.7) for parent, child in pairs]


def test_edges_are_judged_by_the_concept_tree(benchmark):
    possible, chance = benchmark.possible_pairs(CONCEPT_OF, [2, 5, 8], [True] * 8)
    # In the order of levels: animal and person above bird; they and bird above owl, bird, girl.
    assert possible == {("animal", "bird"), ("animal", "owl"), ("bird", "owl"), ("person", "girl")}
    assert chance == 5 / 11
    # Each child fires on 50 / 0.9 tokens, each parent on a tenth of all.
    some = edges((0, 4), (0, 5), (1, 5), (4, 6), (0, 7), (2, 5))
    row = benchmark.judge(some, CONCEPT_OF, possible, 2_000)
    assert (row.edges, row.judged, row.right, row.same_concept, row.splits) == (6, 4, 2, 1, 1)
    assert (row.strict_precision, row.precision) == (2 / 5, 2 / 4)
    assert benchmark.judge(some, CONCEPT_OF, possible, 1_000).splits == 0  # then the child is more than half of it
    assert not benchmark.is_split(replace(some[3], coverage=0.8), 2_000)  # and here it fires too often elsewhere
    assert row.recall == 2 / 4
    # Of animal > bird and bird > owl, which are the tree's own steps, the first is shown; person > female > girl.
    assert row.recall_of_tree_edges == 1 / 2
    nothing = benchmark.judge([], CONCEPT_OF, possible, 1_000)
    assert (nothing.judged, nothing.recall) == (0, 0.0)
    assert math.isnan(nothing.precision)


def test_shuffling_keeps_how_many_children_a_parent_has(benchmark):
    assert benchmark.shuffled_precision([("animal", "owl")] * 5) == 1.0
    mixed = benchmark.shuffled_precision([("animal", "owl"), ("person", "girl")] * 50)
    assert mixed == pytest.approx(0.5, abs=0.05)


def test_a_latent_stands_for_what_it_correlates_with_best(benchmark):
    correlation = torch.zeros(3, len(CONCEPTS))
    names = list(CONCEPTS)
    correlation[0, names.index("owl")], correlation[0, names.index("bird")] = 0.9, 0.6
    correlation[2, names.index("bird")] = 0.39
    assert benchmark.match(correlation, 0.4) == {0: "owl"}


def test_correlations_equal_those_of_dense_activations(benchmark, story_world_sae):
    from hf_msae.data.windows import DocumentEncoder
    from hf_msae.sites import capture, resolve_site
    from hf_msae.worlds.stories import StoryWorld, load_story_lm, token_concepts

    model, tokenizer = load_story_lm()
    site, encoder = resolve_site(model, "layers.2"), DocumentEncoder(tokenizer)
    tokens = benchmark.label_tokens(site, 20)
    found = benchmark.correlations(story_world_sae, tokens)
    latents, labels, kept, ids = [], [], [], []
    for text in StoryWorld(seed=benchmark.LABEL_SEED).documents(20):
        window = encoder.window(encoder.encode([text])[0])
        x = capture(model, [site], input_ids=window.input_ids[None])[site][0]
        kept.append(x[window.keep])
        ids.append(window.input_ids[window.keep])
        latents.append(story_world_sae.encode(x[window.keep]).detach())
        labels += [("animal" in concepts) for concepts in token_concepts(text, tokenizer)][1:]
    assert torch.allclose(tokens.x, torch.cat(kept), atol=1e-4)
    assert torch.equal(tokens.ids, torch.cat(ids))
    dense, animal = torch.cat(latents), torch.tensor(labels).float()
    column = list(CONCEPTS).index("animal")
    for latent in range(8):
        expected = torch.corrcoef(torch.stack([dense[:, latent], animal]))[0, 1].item()
        assert found[latent, column].item() == pytest.approx(expected, abs=1e-3)


@pytest.fixture
def story_world_sae() -> MatryoshkaSAE:
    torch.manual_seed(0)
    config = MatryoshkaSAEConfig(hidden_size=128, num_latents=24, prefix_sizes=[8, 24], k=4, site="layers.2")
    sae = MatryoshkaSAE(config).eval()
    sae.threshold.fill_(1.0)
    return sae


def test_it_runs_whole_and_writes_its_numbers(benchmark, story_world_sae, tmp_path, monkeypatch, capsys):
    story_world_sae.save_pretrained(tmp_path / "sae")
    paths = ["--sae", str(tmp_path / "sae"), "--json", str(tmp_path / "numbers.json")]
    small = ["--label-stories", "20", "--tokens", "3000", "--min-correlation", "0.05"]
    monkeypatch.setattr(sys, "argv", ["hierarchy.py", *paths, *small])
    benchmark.main()
    result = json.loads((tmp_path / "numbers.json").read_text())
    assert list(result["rows"]) == ["coverage", "chance", "score", "use", "order", "strength", "residual"]
    counts = [row["edges"] for row in result["rows"].values()]
    assert counts == sorted(counts, reverse=True)
    assert result["tokens"] >= 3000
    assert "recall_of_tree_edges" in capsys.readouterr().out
