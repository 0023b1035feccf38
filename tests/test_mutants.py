"""Mutants that the tests are tried with: each is Python with one place changed, and the same seed draws the same."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    """`benchmarks/mutants.py`, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "benchmarks" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module  # where its dataclass looks for its annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutants"]


SOURCE = '''
from __future__ import annotations

NÄHE = 0.5  # umlauts are two bytes long


@cached(size=3)
def near(one: float, two: Literal[2] = 2, *, some: bool = True) -> bool:
    """Whether 1 is near 2."""
    if one is None or not some:
        raise ValueError("1" + "2")
    for step in range(one, two):
        log(step, depth=1)
        continue
    return max(one, two) - one < NÄHE
'''


def test_faults_are_where_people_make_them_and_nowhere_else(mutants):
    found = {(m.kind, m.before, m.after) for m in mutants.find_mutants(SOURCE)}
    assert found == {
        ("constant", "0.5", "(1.5)"),
        ("constant", "0.5", "(-0.5)"),
        ("constant", "2", "(3)"),
        ("constant", "2", "(1)"),
        ("constant", "True", "(False)"),
        ("condition", "one is None or not some", "(not (one is None or not some))"),
        ("boolean", "one is None or not some", "(one is None and (not some))"),
        ("comparison", "one is None", "(one is not None)"),
        ("sign", "not some", "(some)"),
        ("removed raise", 'raise ValueError("1" + "2")', "pass"),
        ("swapped arguments", "range(one, two)", "(range(two, one))"),
        ("removed statement", "log(step, depth=1)", "pass"),
        ("forgotten argument", "log(step, depth=1)", "(log(step))"),
        ("constant", "1", "(2)"),
        ("constant", "1", "(0)"),
        ("loop", "continue", "break"),
        ("returned", "max(one, two) - one < NÄHE", "(not max(one, two) - one < NÄHE)"),
        ("comparison", "max(one, two) - one < NÄHE", "(max(one, two) - one <= NÄHE)"),
        ("comparison", "max(one, two) - one < NÄHE", "(max(one, two) - one >= NÄHE)"),
        ("arithmetic", "max(one, two) - one", "(max(one, two) + one)"),
        ("sibling", "max(one, two)", "(min(one, two))"),
    }


@pytest.mark.parametrize("file", ["hf_msae/steering/positions.py", "hf_msae/evaluation/absorption.py"])
def test_each_mutant_is_python_of_another_meaning_with_all_else_as_it_was(mutants, file):
    source = (ROOT / file).read_bytes()
    meaning = ast.dump(ast.parse(source))
    for mutant in mutants.find_mutants(source.decode(), file):
        changed = mutant.of(source)
        assert ast.dump(ast.parse(changed)) != meaning, mutant
        assert changed.startswith(source[: mutant.begin]), mutant
        assert changed.endswith(source[mutant.end :]), mutant
        assert source[mutant.begin : mutant.end].decode() == mutant.before


def test_a_seed_draws_the_same_mutants_each_once(mutants):
    one, again, other = (mutants.draw_mutants(ROOT, "hf_msae/steering", 30, seed) for seed in (0, 0, 1))
    assert one == again != other
    assert len({mutant.name for mutant in one}) == 30
    assert all((ROOT / mutant.file).is_file() for mutant in one)
    assert len({mutant.file for mutant in one}) > 3
    few = mutants.draw_mutants(ROOT, "hf_msae/steering/directions.py", 10**6, 0)
    assert len(few) == len(mutants.find_mutants((ROOT / few[0].file).read_text(), few[0].file))
