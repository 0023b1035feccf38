"""The benchmarks of clean parents: what they compute of their own, and that they run whole."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.interpret import Edge

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def make_edge(parent: int, child: int) -> Edge:
    return Edge(parent, child, 50, 0.9, 0.1, 9.0, 3.0, 0.001, 0.9, 0.2, 0.1, 1.1, 0.7)


@pytest.fixture
def sae() -> MatryoshkaSAE:
    torch.manual_seed(0)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=8, num_latents=24, prefix_sizes=[8, 24], k=4)).eval()
    sae.threshold.fill_(0.3)
    return sae


def test_shared_energy_is_that_of_dense_activations(load, sae):
    benchmark, hierarchy = load("clean_parents"), load("hierarchy")
    generator = torch.Generator().manual_seed(1)
    x, ids = torch.randn(400, 8, generator=generator), torch.randint(12, (400,), generator=generator)
    tokens = hierarchy.LabelledTokens(x, torch.zeros(400, 2), ids)
    edges = [make_edge(0, 9), make_edge(3, 20), make_edge(7, 23)]
    found = benchmark.shared_energy(sae, tokens, edges)
    energies = sae.encode(x).detach().double().square()
    for edge, share in zip(edges, found, strict=True):
        of = {kind: energies[ids == kind].sum(0) for kind in range(12)}
        kinds = [kind for kind in of if of[kind][edge.parent] > 0.01 * energies[:, edge.parent].sum()]
        expected = sum(of[kind][edge.child] for kind in kinds) / energies[:, edge.child].sum()
        assert share == pytest.approx(expected.item(), rel=1e-6)
        assert 0 < share <= 1 + 1e-9


def make_run(judged: int, right: int, possible: int, recall: float) -> dict:
    row = {"judged": judged, "right": right, "same_concept": 4, "splits": 2, "recall": recall}
    row["precision"] = right / judged
    tree = {least: {"edges": row, "energy": row, "possible": possible} for least in ("0.4", "0.5")}
    level = {"child_recall": 0.8, "worst_child": 0.7, "elsewhere": 0.1, "fraction": 0.2}
    fves = [0.5, 0.6, 0.7, 0.8, 0.9]
    sizes = [64, 128, 256, 512, 1024]
    rest = {"prefix_sizes": sizes, "fve": fves, "l0": fves, "absorption": [level], "firing_rate": [0.1] * 1024}
    return rest | {"tree": tree}


def test_edges_are_pooled_over_seeds_and_not_their_precisions(load):
    cells = load("clean_parents").pooled([make_run(10, 9, 20, 0.5), make_run(30, 15, 60, 0.25)], 0.5, "edges")
    assert cells == ["0.60 (0.50 to 0.90)", "0.50", "0.31", "20", "4", "2"]


def test_what_was_measured_is_read_printed_and_drawn(load, tmp_path, monkeypatch, capsys):
    benchmark = load("clean_parents")
    for seed in range(2):
        for place, method in enumerate(("standard", "decoder cut")):
            folder = tmp_path / f"seed-{seed}" / "pass-0" / method
            torch.manual_seed(seed + 2 * place)
            MatryoshkaSAE(
                MatryoshkaSAEConfig(hidden_size=4, num_latents=1024, prefix_sizes=[64, 128, 256, 512, 1024], k=4)
            ).save_pretrained(folder)
            (folder / benchmark.MEASURED_NAME).write_text(json.dumps(make_run(10, 9 - seed, 20, 0.5)))
            names = {name for _, name, *_ in benchmark.CLAIM_COLUMNS}
            numbers = {prefix: {name: [prefix / 1024, seed] for name in names} for prefix in (64, 1024)}
            (folder / benchmark.CLAIMS_NAME).write_text(json.dumps(numbers))
    arguments = ["--output-dir", str(tmp_path), "--plot", str(tmp_path / "picture.png")]
    monkeypatch.setattr(sys, "argv", ["clean_parents.py", "table", *arguments])
    benchmark.main()
    printed = capsys.readouterr().out
    assert "| standard | 2 | 0.900 ± 0.000 | 0.500 ± 0.000 |" in printed
    # A number of several splits is their mean, of which the mean over seeds is shown.
    assert "| standard | 2 | 0.7500 ± 0.3536 | 0.281 ± 0.354 |" in printed
    assert "| decoder cut | 0.85 (0.80 to 0.90) | 0.61 | 0.50 | 10 | 4 | 2 |" in printed
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_toys_run_once_and_are_read_again(load, tmp_path, monkeypatch, capsys):
    toys = load("clean_parents_toys")
    settings = ["--steps", "20", "--seeds", "1", "--world", "hedging", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["clean_parents_toys.py", *settings])
    toys.main()
    first = capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == len(toys.SCHEDULES)
    monkeypatch.setattr(toys, "train", None)  # nothing is trained again
    toys.main()
    assert capsys.readouterr().out == first
    assert [name for name in toys.SCHEDULES if f"| {name} |" in first] == list(toys.SCHEDULES)
