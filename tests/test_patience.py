"""No test depends on how fast the machine is."""

import ast
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from patience import until

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
CLOCKS = ("monotonic", "perf_counter", "time", "process_time", "time_ns", "monotonic_ns", "perf_counter_ns")
# Calls whose first number is a time to wait, by the name that is called.
WAITS = ("wait", "join", "sleep", "result", "wait_for_timeout", "set_default_timeout", "acquire")
LIMIT = re.compile(r"timeout|deadline|patience|wait_|_ms$|_seconds$", re.IGNORECASE)


def _number(node: ast.AST | None) -> bool:
    """Whether a number is written there, or calculated from written ones alone."""
    if isinstance(node, ast.BinOp):
        return _number(node.left) and _number(node.right)
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool)


def _is_clock(node: ast.AST) -> bool:
    """`time.monotonic()` and its like."""
    function = node.func if isinstance(node, ast.Call) else None
    return (
        isinstance(function, ast.Attribute)
        and function.attr in CLOCKS
        and isinstance(function.value, ast.Name)
        and function.value.id == "time"
    )


def _time_limits(node: ast.AST) -> bool:
    """Whether a node sets a limit of its own to the time that something takes, or compares a clock with one."""
    if isinstance(node, ast.keyword):
        return node.arg is not None and bool(LIMIT.search(node.arg)) and _number(node.value)
    if _is_clock(node):
        return True
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name in WAITS and bool(node.args) and _number(node.args[0])
    if isinstance(node, ast.FunctionDef):
        arguments = node.args.args[::-1]
        pairs = [*zip(arguments, node.args.defaults[::-1], strict=False)]
        pairs += [*zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
        return any(LIMIT.search(argument.arg) and _number(default) for argument, default in pairs)
    if isinstance(node, ast.Assign):
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        return _number(node.value) and any(LIMIT.search(name) for name in names)
    return False


def limits_in(source: str) -> list[int]:
    """Lines that make a test depend on how fast the machine is."""
    return sorted({getattr(node, "lineno", 0) for node in ast.walk(ast.parse(source)) if _time_limits(node)})


@pytest.mark.parametrize(
    "line",
    [
        "subprocess.run(command, timeout=300)",
        "process.communicate(timeout=60 * 3)",
        "def launch(plan, timeout: float = 300): ...",
        "deadline = time.monotonic() + 120",
        "assert time.perf_counter() - started < 2",
        "time.sleep(0.5)",
        "thread.join(5)",
        "WAIT_MS = 60_000",
        "page.wait_for_timeout(150)",
        "settings(max_examples=5, deadline=200)",
    ],
)
def test_a_limit_of_its_own_is_found(line):
    assert limits_in(line) == [1]


@pytest.mark.parametrize(
    "line",
    ["subprocess.run(command, timeout=HANG_SECONDS)", "settings(deadline=None)", "thread.join()", "sep.join(words)"],
)
def test_what_waits_until_it_comes_is_not(line):
    assert limits_in(line) == []


def test_no_test_sets_a_limit_of_its_own():
    found = {
        f"{path.relative_to(TESTS)}:{line}"
        for path in TESTS.rglob("*.py")
        if path.name != "patience.py"
        for line in limits_in(path.read_text(encoding="utf-8"))
    }
    assert found == set(), "use HANG_SECONDS or until() of tests/patience.py"


def test_no_subprocess_of_a_test_waits_without_end():
    """Each that is run to its end has the common limit, so that a hang is told."""
    found = [
        f"{path.relative_to(TESTS)}:{node.lineno}"
        for path in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("subprocess.run", "subprocess.check_output", "subprocess.check_call")
        and not any(keyword.arg == "timeout" for keyword in node.keywords)
    ]
    assert found == []


def test_hypothesis_does_not_measure_time():
    assert settings.default.deadline is None
    assert HealthCheck.too_slow in settings.default.suppress_health_check


def test_until_returns_when_it_holds():
    left = iter([False, False, True])
    until(lambda: next(left))
    assert list(left) == []
