"""How `benchmarks/claims.py` reads its numbers: which values a claim compares, and when it holds."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; its neighbour `hierarchy` is found as when it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("claims", BENCHMARKS / "claims.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "claims", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("more", "nested", "plain", "words"),
    [
        (True, [0.3, 0.4, 0.5], [0.1, 0.2, 0.29], "holds"),
        (True, [0.1, 0.2, 0.29], [0.3, 0.4, 0.5], "does not hold"),
        (True, [0.1, 0.9, 0.9], [0.2, 0.2, 0.2], "within noise"),
        (False, [0.1, 0.2], [0.3, 0.4], "holds"),
        (False, [0.3, 0.4], [0.1, 0.2], "does not hold"),
        (False, [0.2, 0.2], [0.2, 0.2], "within noise"),
    ],
)
def test_a_claim_holds_where_no_seed_contradicts_it(claims, more, nested, plain, words):
    assert claims.verdict(claims.Claim("", "m", more), nested, plain) == words


def test_claims_are_read_where_they_are_made(claims):
    sizes = [4, 8, 16]
    numbers: dict = {}
    for prefix, values in zip(sizes, ([0.1, 0.7], [0.3, 0.5], [0.6, 0.2]), strict=True):
        for value in values:
            claims.add(numbers, claims.PLAIN, prefix, fve=value, absent=None)
    read = {
        where: claims.values_of(numbers, claims.PLAIN, claims.Claim("", "fve", True, where), sizes)
        for where in ("whole", "first", "inner", "best")
    }
    assert read["whole"] == [0.6, 0.2]
    assert read["first"] == [0.1, 0.7]
    assert read["inner"] == pytest.approx([0.2, 0.6])
    assert read["best"] == [0.6, 0.7]
    assert "absent" not in numbers[claims.PLAIN, 16]


def test_the_tables_show_means_spreads_and_verdicts(claims):
    numbers: dict = {}
    for method, values in ((claims.MATRYOSHKA, [0.90, 0.92]), (claims.PLAIN, [0.95, 0.95])):
        for prefix in (4, 8):
            for value in values:
                claims.add(numbers, method, prefix, fve=value, l0=3.0)
    lines = claims.write_tables(numbers, [4, 8]).splitlines()
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]] for line in lines if line}
    assert rows["reconstruction costs a little: lower FVE"] == ["0.910 ± 0.014", "0.950 ± 0.000", "holds"]
    # What was not measured has no row.
    assert not any("absorption" in words for words in rows)
    # Two claims are about FVE, and there are two levels.
    assert sum(line.count("0.910 ± 0.014") for line in lines) == 4
