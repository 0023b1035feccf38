"""`benchmarks/steering.py` at a tiny size: what it counts is counted right, and what it writes has its keys."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from warm_processes import run_script

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "steering.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("steering_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_stories_are_counted(benchmark):
    stories = benchmark.Written(
        [["an", "owl", "saw", "an", "owl", "saw", "an", "owl"], ["the", "robin", "sang"], ["no", "animals"]],
        [1.0, 2.0, 6.0],
    )
    assert stories.rate("owl") == pytest.approx(1 / 3)
    assert stories.rate("bird") == pytest.approx(2 / 3)
    assert stories.rate("animal") == 1
    assert stories.density("bird") == pytest.approx(4 / 13)
    assert stories.variety("bird") == 2
    assert stories.loss == 3
    # Seven sequences of three words, of which "an owl saw", "owl saw an" and "saw an owl" are three.
    assert stories.repetition == pytest.approx(3 / 7)


def test_correlations_are_pearsons(benchmark):
    torch.manual_seed(0)
    a, b = torch.randn(40, 3), torch.randn(40, 2)
    expected = torch.corrcoef(torch.cat([a, b], 1).T)[:3, 3:]
    torch.testing.assert_close(benchmark.correlations(a, b), expected)
    constant = torch.full((40, 1), 0.1)
    assert benchmark.correlations(constant, b).abs().max() < 1e-4


def test_it_runs_on_an_sae_of_the_story_model(tmp_path):
    torch.manual_seed(0)
    config = MatryoshkaSAEConfig(hidden_size=128, num_latents=256, k=4, site="layers.2", base_model="stories")
    sae = MatryoshkaSAE(config).eval()
    sae.max_activation.fill_(10.0)
    sae.save_pretrained(tmp_path / "sae")
    arguments = ["--sae", str(tmp_path / "sae"), "--json", str(tmp_path / "numbers.json")]
    arguments += ["--concepts", "2", "--pairs", "1", "--held-out-stories", "60", "--stories", "2", "--new-tokens", "8"]
    arguments += ["--strengths", "1", "2", "--min-occurrences", "10", "--min-correlation", "0.1"]
    arguments += ["--plot", str(tmp_path / "plot.png")]
    status, printed = run_script(SCRIPT, arguments, tmp_path / "out")
    assert status == 0, printed
    result = json.loads((tmp_path / "numbers.json").read_text())
    methods = ["latent", "latent of next", "DiffMean", "DiffMean of next", "random", "found latent", "found few"]
    methods += ["DiffMean at loss"]
    given = [(row["method"], row["strength"]) for row in result["steering"]]
    assert given == [("unsteered", 0.0), *((method, strength) for method in methods for strength in (1.0, 2.0))]
    assert all(len(row["rates"]) == 2 and row["loss"] > 0 for row in result["steering"])
    assert [row["grain"] for row in result["grains"]] == [
        "unsteered",
        *(["coarse"] * 2),
        *(["fine"] * 2),
        *["both"] * 2,
    ]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
