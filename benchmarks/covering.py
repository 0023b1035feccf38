"""A pytest plugin: which tests run which lines of the package, for `benchmarks/mutation.py`.

    COVERING_JSON=lines.json PYTHONPATH=benchmarks python -m pytest -p covering -m "not slow" tests/steering

What a fixture runs is done once for all tests that ask for it, so it counts for each of them. What runs while modules
are imported counts for no test. Processes that a test starts are not looked into.
"""

import json
import os
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import coverage
import pytest


class Covering:
    """Follows a session of pytest, and writes at its end what it saw."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path, self.root = path, root
        self.coverage = coverage.Coverage(data_file=None, config_file=False, include=[f"{root / 'hf_msae'}/*"])
        self.context = ""
        self.asks: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self.coverage.start()

    def _switch(self, context: str) -> str:
        """Lines that run from here on belong to this; returns what they belonged to before."""
        before, self.context = self.context, context
        self.coverage.switch_context(context)
        return before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """What runs within belongs to the test."""
        self.asks[item.nodeid] = list(getattr(item, "fixturenames", []))
        before = self._switch(item.nodeid)
        try:
            return (yield)
        finally:
            self._switch(before)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        """What runs while a shared fixture is made belongs to the fixture."""
        before = self._switch(self.context if fixturedef.scope == "function" else f"fixture {fixturedef.argname}")
        try:
            return (yield)
        finally:
            self._switch(before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """How long each test takes, and which do not pass."""
        self.seconds[report.nodeid] += report.duration
        if report.outcome != "passed":
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write the lines of each file with the numbers of the tests that run them."""
        self.coverage.stop()
        data = self.coverage.get_data()
        tests = [test for test in self.asks if test not in self.failed]
        owners: dict[str, list[int]] = defaultdict(list)
        for number, test in enumerate(tests):
            for context in (test, *(f"fixture {name}" for name in self.asks[test])):
                owners[context].append(number)
        lines = {
            Path(file).relative_to(self.root).as_posix(): {
                line: sorted({number for context in contexts for number in owners[context]})
                for line, contexts in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        written = {"tests": tests, "seconds": [self.seconds[test] for test in tests], "lines": lines}
        self.path.write_text(json.dumps(written), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    """Begin before the package is imported."""
    config.pluginmanager.register(Covering(Path(os.environ["COVERING_JSON"]), config.rootpath))
