"""`benchmarks/serving.py`, with few tokens."""

import json
from pathlib import Path

import pytest
from warm_processes import run_script

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "serving.py"


def test_it_measures_what_it_is_asked_for(stories, tmp_path):
    stories.pipe.saes[""].save_pretrained(tmp_path / "sae")
    options = ["--clients", "1", "3", "--texts", "1", "--new-tokens", "4", "--json", "rates.json"]
    status, printed = run_script(SCRIPT, ["--sae", "sae", *options], tmp_path / "out", tmp_path)
    assert status == 0, printed
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert list(rates) == ["generate", "1 clients", "3 clients"]
    assert all(rate > 0 for rate in rates.values())
