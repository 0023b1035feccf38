"""What the marker `slow` means, and holds: a test that starts a process or a browser has it.

`make fast` runs the others, and does not even import files of which all tests are slow. Slow ones come first when all
run: the last file then is a short one, and no worker is left waiting for another. Python's audit events tell of each
process; a browser is one.
"""

import gc
import multiprocessing.util
import re
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

STARTS = ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty", "multiprocessing.spawn")
# What libraries ask of the system by themselves, once on a machine: fonts (matplotlib), shared libraries (ctypes).
OF_LIBRARIES = ("fc-list", "ldconfig", "/sbin/ldconfig")

WHOLLY_SLOW = re.compile(r"^pytestmark = (\[\s*)?pytest\.mark\.slow\b", re.MULTILINE)
FEW_ARCHITECTURES = {"llama", "gpt2", "bert"}

_started: list[str] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    """Keep what was started."""
    if event in STARTS and (not arguments or str(arguments[0]) not in OF_LIBRARIES):
        _started.append(f"{event} {arguments[0] if arguments else ''}".strip())


def _tell(spawn: Any) -> Any:
    """Give the way by which multiprocessing starts processes the event that it lacks."""

    def told(path: Any, *arguments: Any) -> Any:
        sys.audit("multiprocessing.spawn", path)
        return spawn(path, *arguments)

    return told


sys.addaudithook(_note)
multiprocessing.util.spawnv_passfds = _tell(multiprocessing.util.spawnv_passfds)  # type: ignore[attr-defined]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files of which all tests are slow, and folders of such files, where only others are asked for."""
    if config.option.markexpr != "not slow":
        return None
    files = [collection_path] if collection_path.is_file() else [*collection_path.rglob("test_*.py")]
    return True if files and all(WHOLLY_SLOW.search(file.read_text(encoding="utf-8")) for file in files) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first. Of architectures, a few are tried in the minute of `make fast`, and all of them else."""
    gc.freeze()  # what was imported stays, and need not be looked through again
    models = sys.modules.get("tiny_models")  # imports transformers, so not where no test has need of it
    others = {*models.DECODERS, *models.ENCODERS} - FEW_ARCHITECTURES if models else set()
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if any(isinstance(value, str) and value in others for value in parameters.values()):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_unconfigure() -> None:
    """Objects that nobody holds end before the interpreter does, which extensions would complain of."""
    gc.unfreeze()


def _check(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that is not marked slow and starts a process; what another library starts, `make fast` has not."""
    _started.clear()
    result = yield
    if _started and not any(item.get_closest_marker(name) for name in ("slow", "peer")):
        pytest.fail(f"it starts a process ({_started[0]}), so it needs @pytest.mark.slow", pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fixtures count with the first test that needs them."""
    return (yield from _check(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """The test itself."""
    return (yield from _check(item))
