"""`benchmarks/serving.py`, with few tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from patience import HANG_SECONDS

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "serving.py"


def test_it_measures_what_it_is_asked_for(stories, tmp_path):
    stories.pipe.saes[""].save_pretrained(tmp_path / "sae")
    options = ("--clients", "1", "3", "--texts", "1", "--new-tokens", "4", "--json", "rates.json")
    subprocess.run([sys.executable, SCRIPT, "--sae", "sae", *options], cwd=tmp_path, check=True, timeout=HANG_SECONDS)
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert list(rates) == ["generate", "1 clients", "3 clients"]
    assert all(rate > 0 for rate in rates.values())
