"""What the marker `slow` means, and holds: a test that starts a process or a browser has it.

`make fast` runs the others. Slow ones come first when all run: the last file then is a short one, and no worker is
left waiting for another. Python's audit events tell of each process; a browser is one.
"""

import multiprocessing.util
import sys
from collections.abc import Generator
from typing import Any

import pytest

STARTS = ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty", "multiprocessing.spawn")
# What libraries ask of the system by themselves, once on a machine: fonts (matplotlib), shared libraries (ctypes).
OF_LIBRARIES = ("fc-list", "ldconfig", "/sbin/ldconfig")

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first. Of architectures, a few are tried in the minute of `make fast`, and all of them else."""
    from tiny_models import DECODERS, ENCODERS  # imports transformers, for which the Hub's address must be set first

    others = {*DECODERS, *ENCODERS} - FEW_ARCHITECTURES
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if any(isinstance(value, str) and value in others for value in parameters.values()):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def _check(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that is not marked slow and starts a process."""
    _started.clear()
    result = yield
    if _started and item.get_closest_marker("slow") is None:
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
