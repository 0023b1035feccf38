"""`hf-msae toy` end to end, small; and what it trains and prints."""

import json
import math
from pathlib import Path

import pytest
import torch
from warm_processes import run_script

from hf_msae.cli.main import main
from hf_msae.research.toys import TOYS
from hf_msae.research.toys.experiment import (
    VARIANTS,
    ToyArguments,
    evaluate,
    format_cell,
    make_sae,
    make_untrained,
    run_toy,
    train,
    wrong_places,
)

pytestmark = pytest.mark.slow


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["toy", *arguments])
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def trained():
    """The hedging toy from the truth, as its source trains it, but shorter."""
    variants = ["vanilla", "fixed", "balanced", "detached"]
    return run_toy(ToyArguments(world="hedging", init="truth", steps=300, seeds=1, variants=variants))


def test_the_command_prints_a_table_and_leaves_numbers_and_a_picture(tmp_path, capsys):
    arguments = ["--world", "parent", "--seeds", "2", "--steps", "10", "--output-dir", str(tmp_path / "toy")]
    assert run(*arguments, "--variants", "vanilla", "pareto") == 0
    text = capsys.readouterr().out
    content = json.loads((tmp_path / "toy" / "recovery.json").read_text())
    assert list(content["runs"]) == ["vanilla", "pareto", "untrained", "shuffled"]
    assert all(len(runs) == 2 for runs in content["runs"].values())
    values = [run["matched_cosine"] for run in content["runs"]["pareto"]]
    mean, spread = content["mean_and_sd"]["pareto"]["matched cosine"]
    assert mean == pytest.approx(sum(values) / 2)
    assert spread == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    line = next(line for line in text.splitlines() if line.strip().startswith("matched cosine"))
    assert line.split()[3] == format_cell(values, signed=False)
    assert (tmp_path / "toy" / "heatmaps.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "toy").iterdir()} == {"recovery.json", "heatmaps.png"}


def test_vanilla_absorbs_and_matryoshka_hedges(trained):
    """The picture of arXiv:2505.11756: signs and order of its three numbers, and the balance in between."""
    vanilla, fixed, balanced, detached = (
        trained.recoveries[name][0] for name in ("vanilla", "fixed", "balanced", "detached")
    )
    assert vanilla.parent_strength_ratio < 0.8
    assert vanilla.encoder.parent_to_child < -0.1
    assert vanilla.decoder.child_to_parent > 0.1
    for recovery in (fixed, detached):
        assert recovery.parent_recall_with_child > 0.99
        assert recovery.decoder.parent_to_child > 0.07
        assert recovery.encoder.parent_to_child > 0.05
    assert detached.decoder.parent_to_child > fixed.decoder.parent_to_child > balanced.decoder.parent_to_child > 0.02
    assert balanced.matched_cosine > max(fixed.matched_cosine, detached.matched_cosine, vanilla.matched_cosine)


def test_the_controls_fail(trained):
    untrained, shuffled = (trained.recoveries[name][0] for name in ("untrained", "shuffled"))
    assert untrained.matched_cosine < 0.5
    assert untrained.parent_recall_alone == 0
    assert untrained.fve < 0.2
    fixed = trained.recoveries["fixed"][0]
    assert shuffled.matched_cosine == pytest.approx(fixed.matched_cosine)  # does not ask about the hierarchy
    assert shuffled.order == 0
    assert abs(shuffled.decoder.parent_to_child) < fixed.decoder.parent_to_child


@pytest.mark.parametrize("name", TOYS)
def test_shuffled_labels_make_every_edge_wrong(name):
    forest = TOYS[name](0).world.forest
    for seed in range(5):
        places = wrong_places(forest, seed)
        assert sorted(places.tolist()) == list(range(forest.num_features))
        assert not {(int(places[p]), int(places[c])) for p, c in forest.edges} & set(forest.edges)


def test_variants_differ_in_their_levels_only():
    toy = TOYS["tree"](0)
    configs = {name: make_sae(toy, name, "relu").config for name in VARIANTS}
    assert {name: config.prefix_sizes for name, config in configs.items() if config.num_levels == 1} == {
        "vanilla": [20]
    }
    assert configs["balanced"].normalized_level_weights[0] == pytest.approx(0.75**4 / sum(0.75**i for i in range(5)))
    assert [name for name, config in configs.items() if config.detach_prefixes] == ["detached"]
    assert [name for name, config in configs.items() if config.prefix_sampling == "pareto"] == ["pareto"]
    assert [config.k for config in configs.values()] == pytest.approx([1.12] * 5)


def test_a_seed_repeats_a_run():
    args, toy = ToyArguments(world="parent", steps=5), TOYS["parent"](0)
    weights = []
    for seed in (0, 0, 1):
        sae = make_sae(toy, "fixed", "batch_topk")
        train(sae, toy, args, seed, lambda: None)
        weights.append(sae.W_dec.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


def test_an_untrained_sae_has_the_truths_l0():
    toy = TOYS["tree"](0)
    recovery = evaluate(make_untrained(toy, ToyArguments(), 0), toy, 0)
    assert recovery.l0 == pytest.approx(toy.world.forest.l0, rel=0.05)
    assert recovery.found == 0


def test_cells():
    assert format_cell([0.5, 0.7], signed=False) == ".60±.14"
    assert format_cell([-0.001], signed=True) == "+.00"
    assert format_cell([1.25], signed=False) == "1.25"
    assert format_cell([10.5, 10.5], signed=True) == "+10.50±.00"
    assert format_cell([math.nan], signed=True) == "–"
    assert format_cell([math.nan, -0.25], signed=True) == "-.25"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--variants", "vanilla", "tied"],
            "--variants must be of vanilla, fixed, pareto, balanced, detached; got tied",
        ),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--world", "forest"], "invalid choice: 'forest'"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, capsys, arguments, message):
    assert run(*arguments, "--output-dir", str(tmp_path / "toy")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "toy").exists()


def test_the_benchmark_writes_the_tables_of_the_docs(tmp_path):
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "toys.py"
    arguments = ["--settings", "parent", "--seeds", "2", "--steps", "3", "--pictures", str(tmp_path / "pictures")]
    outputs = ["--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    status, printed = run_script(script, [*arguments, *outputs], tmp_path / "out")
    assert status == 0, printed
    written = json.loads((tmp_path / "a.json").read_text())["settings"]["parent"]
    table = (tmp_path / "a.md").read_text()
    cells = [run["matched_cosine"] for run in written["runs"]["vanilla"]]
    row = next(line for line in table.splitlines() if line.startswith("| matched cosine"))
    assert row.split("|")[2].strip() == format_cell(cells, signed=False)
    assert table in printed
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["parent.png"]
