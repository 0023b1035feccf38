"""Do the tests notice when the code is wrong? Small faults are put into it, one at a time, and tests run.

    pip install --editable ".[test,coverage]"
    python benchmarks/mutation.py --json mutation.json          # goes on with a file that is not whole
    python benchmarks/mutation.py --json mutation.json --again --tests=tests/cli/test_eval.py

The second command tries survivors again, with the tests as they are now, and with tests of other rooms. Faults in
statements that have changed since are gone: they stay in the file as they were.

Faults are drawn by a seed (`mutants.py` says of which kinds), the same number of each target. They are put into a copy
of the tree, never into the tree. First it is learned which of the quick tests of its room run which lines
(`covering.py`). A fault is put before those that run its line, then before all tests of the file that mirrors the
module, also slow ones, and last before those that are named; the first that fails has caught it. One that hangs, ten
times as long as the same tests take without it, is caught as well.

What survives is either a test that is missing, or changes nothing that anyone could see. The latter are judged by
reading, and stand with the reason in `equivalent_mutants.json`; they count for nothing.
"""

import argparse
import ast
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mutants import Mutant, draw_mutants, find_mutants

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["hf_msae/evaluation", "hf_msae/interpret", "hf_msae/steering", "hf_msae/training/collectives.py"]
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.json")
# Where the sources lie, and where they are when they are installed; the copy has both.
INSTALLED = {"hf_msae/modeling": "modeling", "hf_msae/space": "spaces/steering"}
# Times longer than without a fault, after which tests hang.
HANGS = 10
ENDED = ("FAILED ", "ERROR ")
# What must not be imported before the tests say where the Hub is; and they themselves.
OF_THE_HUB = ("huggingface_hub", "transformers", "accelerate", "datasets", "peft", "hf_msae", "tests")


class Run(NamedTuple):
    """What became of some tests: whether all passed, the first that did not and why, and how long they took."""

    passed: bool
    reason: str
    seconds: float


class Copy:
    """A copy of the tree, in which Python finds the package before any that is installed.

    Args:
        folder: Where it lies.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        shutil.rmtree(self.root, ignore_errors=True)
        listed = subprocess.run(
            ("git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():  # what was deleted is listed until that is committed
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)
        for place, source in INSTALLED.items():
            (self.root / place).symlink_to(self.root / source, target_is_directory=True)
        shared = folder / "shared"
        if (ROOT.parent / "shared").is_dir() and not shared.exists():
            shared.symlink_to(ROOT.parent / "shared", target_is_directory=True)
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        path = [str(self.root), str(self.root / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        self.environment |= {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
        self._check()

    def _check(self) -> None:
        """A fault in the copy is worth nothing where the tests import something else."""
        program = "import hf_msae, hf_msae.modeling; print(hf_msae.__file__, hf_msae.modeling.__file__, sep='\\n')"
        found = subprocess.run(
            (sys.executable, "-c", program), cwd=self.root, env=self.environment, capture_output=True, text=True
        )
        files = found.stdout.split("\n")[:2]
        if not all(Path(file).is_relative_to(self.root) for file in files):
            raise RuntimeError(f"tests of the copy in {self.root} would import {files}. {found.stderr}")

    def warm(self, modules: Iterable[str]) -> None:
        """Import what these modules of the package import of others, so that no run of tests has to.

        Not what reads the address of the Hub once and for all, which the tests set.
        """
        program = (
            "import importlib, json, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
        )
        others = ("pytest", "hypothesis", "datasets", "transformers.models.llama.modeling_llama", "torch._dynamo")
        listed = subprocess.run(
            (sys.executable, "-c", program, *modules, *others),
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        for name in listed.stdout.split():
            if name.partition(".")[0] not in OF_THE_HUB and not name.startswith("__"):
                with contextlib.suppress(Exception):  # parts that a package made at its own import cannot be asked for
                    importlib.import_module(name)
        gc.freeze()

    def pytest(self, arguments: Sequence[str], limit: float | None = None, **environment: str) -> Run:
        """Run tests until one fails, in a fork of this process, or until the limit in seconds."""
        began = time.monotonic()
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            process = multiprocessing.get_context("fork").Process(
                target=self._run_pytest, args=(output.fileno(), list(arguments), environment)
            )
            process.start()
            process.join(limit)
            if process.exitcode is None:
                os.killpg(process.pid, signal.SIGKILL)  # with processes that the tests have started
                process.join()
                return Run(False, "hangs", time.monotonic() - began)
            output.seek(0)
            text = output.read()
        ended = [line for line in text.splitlines() if line.startswith(ENDED)]
        passed = process.exitcode == 0
        return Run(passed, "" if passed else (ended or [text[-300:]])[0], time.monotonic() - began)

    def _run_pytest(self, output: int, arguments: list[str], environment: Mapping[str, str]) -> None:
        """What the fork does."""
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(self.root)
        os.environ.clear()
        os.environ |= self.environment | environment
        sys.path[:0] = [str(self.root)]
        sys.dont_write_bytecode = False
        import pytest

        status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *arguments])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def with_fault(self, mutant: Mutant, source: bytes | None) -> None:
        """Write a file of the copy with a fault, or as it was: `source` is given to put it back."""
        file = self.root / mutant.file
        file.write_bytes(mutant.of(file.read_bytes()) if source is None else source)
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
            compiled.unlink()  # Python tells versions apart by size and second, which may be the same


class Covered:
    """Which tests run which lines, and how long each takes."""

    def __init__(self) -> None:
        self.lines: dict[str, dict[int, set[str]]] = {}
        self.seconds: dict[str, float] = {}

    def read(self, file: Path) -> None:
        """Add what `covering.py` wrote of some tests."""
        written = json.loads(file.read_text(encoding="utf-8"))
        self.seconds |= zip(written["tests"], written["seconds"], strict=True)
        for name, lines in written["lines"].items():
            for line, numbers in lines.items():
                tests = self.lines.setdefault(name, {}).setdefault(int(line), set())
                tests.update(written["tests"][number] for number in numbers)

    def tests_of(self, mutant: Mutant, source: str) -> list[str]:
        """The tests that run a mutant's lines, or else the statement's around it, or else any line of its file."""
        lines = self.lines.get(mutant.file, {})
        for first, last in (
            (mutant.line, mutant.last_line),
            statement_around(source, mutant.line),
            (0, len(source)),
        ):
            found = set().union(*(lines.get(line, ()) for line in range(first, last + 1)))
            if found:
                own = mirror(mutant.file)
                return sorted(found, key=lambda test: (not test.startswith(f"{own}::"), self.seconds[test]))
        return []


def statement_around(source: str, line: int) -> tuple[int, int]:
    """The first and last line of the innermost simple statement, or of the head of the innermost block, at a line."""
    best = (line, line)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or line):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno or line
            if line <= last and node.lineno >= best[0] - (best[1] - best[0]):
                best = (node.lineno, max(node.lineno, last))
    return best


def mirror(file: str) -> str:
    """The test file that mirrors a module."""
    path = Path(file)
    return str(Path("tests", *path.parts[1:-1], f"test_{path.name}"))


def learn(copy: Copy, targets: Iterable[str], folder: Path) -> Covered:
    """Run the quick tests of each target's room, unless that was done, and read which lines they run."""
    covered = Covered()
    for target in targets:
        tests = mirror(target) if target.endswith(".py") else f"tests/{Path(target).name}"
        file = folder / f"{Path(target).stem}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            print(f"learning which lines {tests} runs", flush=True)
            only = ["-p", "covering", "--maxfail=1000000", "-m", "not slow"]
            run = copy.pytest([*only, tests], COVERING_JSON=str(file), COVERAGE_CORE="ctrace")
            if not file.is_file():
                raise RuntimeError(f"the tests in {tests} could not be followed: {run.reason}")
        covered.read(file)
        if not any(lines for name, lines in covered.lines.items() if name.startswith(target)):
            raise RuntimeError(f"{tests} ran no line of {target}, says {file}: delete it, and see what they import")
    return covered


def try_mutant(
    copy: Copy, mutant: Mutant, covered: Covered, times: dict[tuple[str, ...], float], more: Sequence[str]
) -> dict[str, Any]:
    """Put the fault into the copy, run tests, and take it out again."""
    source = (copy.root / mutant.file).read_bytes()
    covering = covered.tests_of(mutant, source.decode())
    own = mirror(mutant.file)
    rounds = [covering, [own] if (copy.root / own).is_file() else [], list(more)]
    run, tried = Run(True, "", 0.0), 0.0
    for tests in filter(None, rounds):
        usual = usual_seconds(copy, tests, covered, times)
        copy.with_fault(mutant, None)
        try:
            run = copy.pytest(tests, limit=HANGS * usual)
        finally:
            copy.with_fault(mutant, source)
        tried += run.seconds
        if not run.passed:
            break
    return {"caught": not run.passed, "by": run.reason[:300], "tests": len(covering), "seconds": round(tried, 1)}


def usual_seconds(copy: Copy, tests: list[str], covered: Covered, times: dict[tuple[str, ...], float]) -> float:
    """How long tests take without a fault: learned before, or measured here."""
    if all(test in covered.seconds for test in tests):
        return times[()] + sum(covered.seconds[test] for test in tests)
    if tuple(tests) not in times:
        run = copy.pytest(tests)
        if not run.passed:
            raise RuntimeError(f"{tests} fail without a fault: {run.reason}")
        times[tuple(tests)] = run.seconds
    return times[tuple(tests)]


def read_equivalent() -> dict[tuple[str, ...], str]:
    """Reasons of mutants that were judged to be no faults."""
    if not EQUIVALENT.is_file():
        return {}
    return {identity(entry): entry["reason"] for entry in json.loads(EQUIVALENT.read_text(encoding="utf-8"))}


def identity(mutant: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a mutant apart also after lines above it have changed."""
    return tuple(str(mutant[name]) for name in ("file", "statement", "before", "after"))


def describe(result: Mapping[str, Any]) -> str:
    """A mutant in a line."""
    return f"{result['file']}:{result['line']}: {result['before']} -> {result['after']} in `{result['statement']}`"


def find_again(copy: Copy, result: Mapping[str, Any]) -> Mutant | None:
    """A mutant in the file as it is now, nearest to where it was; None where its statement is no longer there."""
    source = (copy.root / result["file"]).read_text("utf-8")
    same = [m for m in find_mutants(source, result["file"]) if identity(asdict(m)) == identity(result)]
    return min(same, key=lambda mutant: abs(mutant.line - result["line"]), default=None)


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many were caught, as a whole and of each target, and what survives."""
    reasons = read_equivalent()
    tried = [result for result in results if "caught" in result]
    equivalent = [result for result in tried if not result["caught"] and identity(result) in reasons]
    faults = [result for result in tried if result not in equivalent]
    number = Counter(result["target"] for result in faults)
    caught = Counter(result["target"] for result in faults if result["caught"])
    return {
        "drawn": len(results),
        "tried": len(tried),
        "equivalent": {describe(result): reasons[identity(result)] for result in equivalent},
        "faults": len(faults),
        "caught": sum(caught.values()),
        "of_targets": {target: f"{caught[target]} of {number[target]}" for target in number},
        "survivors": [describe(result) for result in faults if not result["caught"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("targets", nargs="*", default=TARGETS, help="folders or files of the package")
    parser.add_argument("--number", type=int, default=20, help="faults of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, help="what was found; goes on with it where it is there")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutation", help="of the copy")
    parser.add_argument("--again", action="store_true", help="try survivors again, with the tests as they are now")
    parser.add_argument("--only", default="", help="of those that are left, only files with this in their path")
    parser.add_argument("--tests", nargs="*", default=[], help="test files that are tried last")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    copy = Copy(folder)
    if arguments.json.is_file():
        results = json.loads(arguments.json.read_text(encoding="utf-8"))["mutants"]
    else:
        results = []
        for target in arguments.targets:
            drawn = draw_mutants(copy.root, target, arguments.number, arguments.seed)
            results += [{"target": target} | asdict(mutant) for mutant in drawn]
    copy.warm(sorted({result["file"].removesuffix(".py").replace("/", ".") for result in results}))
    targets = list(dict.fromkeys(result["target"] for result in results))
    covered = learn(copy, targets, folder / "lines")
    times = {(): copy.pytest(["--collect-only", *sorted({f"tests/{Path(t).parts[1]}" for t in targets})]).seconds}
    for result in results:
        left = "caught" not in result or (arguments.again and not result["caught"])
        if left and arguments.only in result["file"]:
            mutant = find_again(copy, result)
            if mutant is None:
                print("GONE    ", describe(result), flush=True)
                continue
            result |= try_mutant(copy, mutant, covered, times, arguments.tests)
            print("caught  " if result["caught"] else "SURVIVES", describe(result), result["by"], flush=True)
            arguments.json.write_text(
                json.dumps(summarize(results) | {"mutants": results}, indent=1), encoding="utf-8"
            )
    print(json.dumps(summarize(results), indent=1))


if __name__ == "__main__":
    main()
