"""The benchmarks run, at a tiny size and in processes of their own, as a user starts them: what they measure is real,
what they write has its keys, and peers that are absent are skipped with a reason.
"""

import importlib
import importlib.util
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from warm_processes import run_script

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = ["--batch-size", "64", "--hidden-size", "16", "--num-latents", "512", "--k", "4", "--threads", "1"]
PEERS = {"saelens": "sae-lens", "dictionary_learning": "dictionary-learning", "sparsify": "eai-sparsify"}
OURS = ["gemm", "ours-plain", "ours", "ours-transcoder"]


def numbers(tmp_path: Path, script: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """The JSON that a benchmark writes, and what it prints."""
    file = tmp_path / "numbers.json"
    status, printed = run_script(BENCHMARKS / script, [*arguments, "--json", str(file)], tmp_path / "out")
    assert status == 0, printed
    return json.loads(file.read_text()), printed


def test_train_step_measures_all_that_are_installed(tmp_path):
    result, printed = numbers(tmp_path, "train_step.py", *TINY, "--repeats", "3", "--warmup", "2")
    absent = {name for name, package in PEERS.items() if not list(metadata.distributions(name=package))}
    assert result["skipped"].pop("ours-graphs") == "needs a GPU"
    assert set(result["skipped"]) == absent
    for name in absent:
        assert f"skipped {name}: {PEERS[name]} is not installed" in printed
    present = [name for name in PEERS if name not in absent]
    assert list(result["seconds"]) == OURS + present
    for name, median in result["seconds"].items():
        times = result["all_seconds"][name]
        assert len(times) == 3
        assert sorted(times)[1] == median > 0
    pairs = ["ours/gemm", "ours/ours-plain", "ours-transcoder/ours", *(f"{name}/ours" for name in present)]
    assert list(result["ratios"]["time"]) == pairs
    assert result["ratios"]["time"]["ours/gemm"] == result["seconds"]["ours"] / result["seconds"]["gemm"]
    assert result["setting"]["num_latents"] == 512
    assert (result["memory"], result["busy"]) == ({}, {})


def test_steps_beside_busy_processes(tmp_path):
    """They are there while steps are taken, and gone afterwards."""
    sizes = [argument for argument in TINY if argument not in ("--threads", "1")]
    asked = ["--threads", "2", "--busy", "1", "--only", "gemm", "ours", "--repeats", "1"]
    result, printed = numbers(tmp_path, "train_step.py", *sizes, *asked)
    assert {threads: list(found) for threads, found in result["busy"].items()} == {
        "2 threads": ["gemm", "ours"],
        "1 thread": ["gemm", "ours"],
    }
    assert printed.count("x quiet") == 4


def test_busy_processes_end(train_step):
    with train_step.busy_cores(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert all(process.poll() is not None for process in processes)


@pytest.mark.skipif(platform.system() != "Linux", reason="memory on the CPU is read from /proc")
def test_memory_of_the_product_is_its_output(tmp_path):
    """512 × 8,192 numbers of 4 bytes are 16.8 MB, which the system counts, too, give or take what it counts late."""
    sizes = ["--batch-size", "512", "--hidden-size", "16", "--num-latents", "8192", "--levels", "1", "--k", "4"]
    only = ["--only", "gemm", "ours", "--repeats", "1", "--threads", "1", "--memory"]
    result, _ = numbers(tmp_path, "train_step.py", *sizes, *only)
    product = result["memory"]["gemm"]
    assert product["step"] == pytest.approx(16.8, abs=2)
    assert product["above_state"] >= product["step"]
    assert product["state"] == pytest.approx(16 * 8192 * 4 / 1e6)
    # W_enc, W_dec, b_enc, b_dec, each with Adam's two averages; counts of steps are less than the tolerance.
    weights = 2 * 16 * 8192 + 8192 + 16
    assert result["memory"]["ours"]["state"] == pytest.approx(3 * weights * 4 / 1e6, abs=1e-3)
    assert result["ratios"]["memory"]["ours/gemm"] == result["memory"]["ours"]["step"] / product["step"]


def test_scaling_changes_one_size_at_a_time(tmp_path):
    picture = tmp_path / "scaling.png"
    result, printed = numbers(tmp_path, "scaling.py", *TINY, "--repeats", "1", "--plot", str(picture))
    values = {name: [point["value"] for point in points] for name, points in result["series"].items()}
    assert values == {
        "num_latents": [128, 256, 512, 1024, 2048],
        "k": [1, 2, 4, 8, 16],
        "levels": [1, 2, 3, 5, 8],
        "hidden_size": [8, 16, 32],
    }
    assert all(
        point["seconds"] > 0 and point["gemm_seconds"] > 0 for points in result["series"].values() for point in points
    )
    if importlib.util.find_spec("matplotlib"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    else:
        assert "no plot: matplotlib is not installed" in printed


@pytest.fixture
def train_step(monkeypatch):
    """The benchmark as a module, as its own folder sees it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_step")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-latents", "8", "--levels", "5"], "5 levels need at least 16 latents, got 8"),
        (["--levels", "0"], "levels must be at least 1, got 0"),
        (["--warmup", "0"], "--repeats and --warmup must be at least 1, got 5 and 0"),
        (["--busy", "-1"], "--busy must be a number of processes, at least 0, got -1"),
        (["--only", "ours", "theirs"], "invalid choice: 'theirs'"),
    ],
)
def test_impossible_settings_are_refused(train_step, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--threads", "1", *arguments])
    with pytest.raises((ValueError, SystemExit)) as refusal:
        train_step.main()
    assert message in str(refusal.value) + capsys.readouterr().err


@pytest.mark.parametrize("when", ["built", "first step", "third step"])
def test_a_peer_without_enough_memory_leaves_the_others_measured(train_step, monkeypatch, capsys, tmp_path, when):
    def build(setting, batch):
        def step(batch, number):
            if when == "first step" or (when == "third step" and number == 2):
                torch.empty(1 << 50)
            return batch + 1

        if when == "built":
            torch.empty(1 << 50)
        return train_step.Contender(step, lambda: [])

    greedy = train_step.CONTENDERS["gemm"]._replace(build=build)
    monkeypatch.setitem(train_step.CONTENDERS, "gemm", greedy)
    sizes = ["--batch-size", "16", "--hidden-size", "8", "--num-latents", "64", "--k", "4", "--levels", "2"]
    output = ["--repeats", "3", "--warmup", "1", "--threads", "1", "--json", str(tmp_path / "result.json")]
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--only", "gemm", "ours", *sizes, *output])
    train_step.main()
    assert "skipped gemm: not enough memory" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["seconds"]) == ["ours"]
    assert len(result["all_seconds"]["ours"]) == 3
    assert result["skipped"]["gemm"] == "not enough memory"


def test_only_absent_peers_leave_nothing_to_measure(train_step, monkeypatch, capsys):
    if list(metadata.distributions(name="sae-lens")):
        pytest.skip("sae-lens is installed, so there is something to measure")
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--threads", "1", "--only", "saelens"])
    with pytest.raises(SystemExit, match=r"pip install hf-msae\[benchmarks\]"):
        train_step.main()
    assert "skipped saelens: sae-lens is not installed" in capsys.readouterr().out


@pytest.mark.skipif(platform.system() != "Linux", reason="memory on the CPU is read from /proc")
def test_encoding_is_timed_beside_the_language_model(tmp_path):
    sizes = ["--tokens", "2k", "--num-latents", "64", "--k", "4", "--repeats", "1", "--threads", "1"]
    result, printed = numbers(tmp_path, "encode.py", *sizes)
    assert 2000 <= result["setting"]["tokens"] < 2300
    assert result["setting"]["active"] == pytest.approx(4, rel=0.1)
    seconds = {name: times[0] for name, times in result["seconds"].items()}
    assert result["ratios"] == {
        f"encode/{name}": seconds["encode"] / seconds[name] for name in ("until the site", "whole model")
    }
    assert len(result["memory_mb"]) == 4
    assert max(result["memory_mb"]) > 100
    assert "bytes a token" in printed


def test_methods_are_trained_on_the_same_tokens_and_not_again(tmp_path):
    """A method that changes the run has a pass of its own, and a second call trains what was not asked for before."""
    sizes = ["--num-latents", "32", "--k", "2", "--tokens", "2048", "--batch-size", "256", "--seeds", "2"]
    small = [f"--{name}-tokens=1000" for name in ("eval", "calibration", "ce")]
    small += ["--output-dir", str(tmp_path / "methods")]
    first, _ = numbers(tmp_path, "methods.py", *sizes, *small, "--methods", "BatchTopK")
    methods = ("BatchTopK", "recipe reconstruction", "BatchTopK, not nested")
    both, printed = numbers(tmp_path, "methods.py", *sizes, *small, "--methods", *methods)
    assert both["numbers"]["BatchTopK"] == first["numbers"]["BatchTopK"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert rows[0] == ["method", "L0", *(f"FVE at {size}" for size in (2, 4, 8, 16, 32)), "CE rec. (mean)", "dead"]
    assert [row[0] for row in rows[2:]] == list(methods)
    assert rows[4][2:6] == [""] * 4
    for row, name in zip(rows[2:], methods, strict=True):
        fve = [one["levels"][-1]["fve"] for one in both["numbers"][name]]
        assert len(set(fve)) == 2
        assert row[6].startswith(f"{sum(fve) / 2:.3f} ± ")


def test_a_copy_that_leaves_for_predictions_ends_where_a_run_with_them_does(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("kl_finetune")
    sizes = ["--tokens", "4096", "--batch-size", "512", "--num-latents", "64", "--held-out-tokens", "600"]
    monkeypatch.setattr(sys, "argv", ["kl_finetune.py", *sizes, "--ce-tokens", "400", "--kl-from", "0.5"])
    options = benchmark.parse()
    monkeypatch.setattr("claims.STORY_DOCUMENTS", 400)
    world = benchmark.load_world(options)
    found = benchmark.train(world, options, 0, str(tmp_path / "copy"))
    (whole,) = benchmark.make_trainer(world, options, 0, str(tmp_path / "whole")).train().values()
    assert list(found) == ["never", "from 0.5"]
    for name in ("l0", "fve", "kl", "ce_recovered_mean"):
        assert [level[name] for level in found["from 0.5"]["levels"]] == [getattr(one, name) for one in whole.levels]
    table = benchmark.write_table({name: [measured, measured] for name, measured in found.items()})
    rows = [line.split(" | ") for line in table.splitlines()]
    assert [row[0] for row in rows[2:]] == ["| never", "| from 0.5", "| difference"]
    levels = [found[name]["levels"][-1]["fve"] for name in ("from 0.5", "never")]
    assert rows[-1][6] == f"{levels[0] - levels[1]:.3f} ± 0.000"


def test_synth_bench_gives_all_methods_the_same_samples_and_trains_none_twice(tmp_path):
    sizes = ["--scale", "128", "--samples", "5120", "--batch-size", "256", "--seeds", "2", "--eval-samples", "6000"]
    sizes += ["--saelens-rates", "3e-3", "--output-dir", str(tmp_path / "bench")]
    first, _ = numbers(tmp_path, "synth_bench.py", *sizes, "--methods", "BatchTopK")
    both, printed = numbers(tmp_path, "synth_bench.py", *sizes, "--methods", "BatchTopK", "Matryoshka")
    peers = ["SAELens BatchTopK, 0.003", "SAELens Matryoshka, 0.003"]
    if not list(metadata.distributions(name="sae-lens")):
        assert "skipped SAELens: sae-lens is not installed" in printed
        peers = []
    assert list(both["numbers"]) == ["BatchTopK", "Matryoshka", *peers]
    for name, found in first["numbers"].items():
        assert both["numbers"][name] == found  # times included: it was read, not trained again
    facts = both["facts"]
    assert (facts["features"], facts["num_latents"], facts["prefix_sizes"]) == (128, 32, [1, 4, 16, 32])
    # As much of what fires is active, and as much noise is read, as in the full world.
    assert facts["k"] / facts["true_l0"] == pytest.approx(25 / 34.5)
    assert facts["true_l0"] / facts["hidden_size"] == pytest.approx(34.5 / 768, rel=0.02)
    true_l0 = {tuple(run["true_l0"] for run in found) for found in both["numbers"].values()}
    assert len(true_l0) == 1, "the same samples measure all of them"
    (of_seeds,) = true_l0
    assert of_seeds[0] != of_seeds[1]
    assert of_seeds == pytest.approx([facts["true_l0"]] * 2, rel=0.1)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert rows[0][1:5] == ["F1", "precision", "recall", "MCC"]
    for row, (name, found) in zip(rows[2:], both["numbers"].items(), strict=True):
        assert [run["l0"] for run in found] == pytest.approx([facts["k"]] * 2, rel=0.15)
        assert row[0] == name
        assert row[1].startswith(f"{sum(run['f1'] for run in found) / 2:.3f} ± ")
