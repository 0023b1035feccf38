"""Processes of a run, forked from one that has imported what they need.

A fresh Python needs ten seconds of a slow machine for torch, transformers and hf_msae, which is more than most runs of
the tests take. So one process a session imports them, before any thread starts, and every process of a run is forked
from it. They are real processes that talk over gloo, as those of a launcher; `tests/cli/test_commands.py` starts some
by torch's own.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from patience import HANG_SECONDS

IMPORTED = [
    "hf_msae.training.trainer",
    "hf_msae.cli.train",
    "hf_msae.data.cache",
    "hf_msae.interpret.pipeline",
    "hf_msae.evaluation.pipeline",
    "matplotlib.figure",
    "rich.table",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "torch.distributed",
]


def free_port() -> int:
    """A port at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_together(num_processes: int, program: Callable[..., Any], *arguments: Any, output: Path) -> tuple[int, str]:
    """Execute a function in so many processes, a group where there are several; one that fails ends the others.

    Args:
        num_processes: How many.
        program: A function of a module.
        *arguments: What each process gives to it.
        output: Where each process writes stdout and stderr, `output.0`, `output.1`, ….

    Returns:
        The status of the first process that failed, 0 where none did, and what all wrote.
    """
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    group |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes))
    started: list[BaseProcess] = []
    for rank in map(str, range(num_processes)):
        own = group | {"RANK": rank, "LOCAL_RANK": rank} if num_processes > 1 else {}
        started.append(_start({**os.environ, **own}, f"{output}.{rank}", program, arguments))
    status = _wait_for(started)
    return status, "".join(Path(f"{output}.{rank}").read_text(encoding="utf-8") for rank in range(num_processes))


def run_command(num_processes: int, arguments: list[str], output: Path) -> tuple[int, str]:
    """Execute `hf-msae` with these arguments in so many processes, as `run_together` does."""
    return run_together(num_processes, _command, arguments, output=output)


def start_command(arguments: list[str], output: Path) -> BaseProcess:
    """Start `hf-msae` with these arguments and do not wait; what it writes goes to `output`."""
    return _start(dict(os.environ), str(output), _command, (arguments,))


def run_script(script: Path, arguments: list[str], output: Path, cwd: Path | None = None) -> tuple[int, str]:
    """Execute `python SCRIPT ARGUMENTS` in a folder, as `run_together` does."""
    return run_together(1, _script, str(script), arguments, str(cwd or Path.cwd()), output=output)


def _start(environment: dict[str, str], output: str, program: Callable[..., Any], arguments: tuple) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    os.environ["OMP_NUM_THREADS"] = "1"  # before the process that imports starts: its libraries read it once
    process = context.Process(target=_one, args=(environment, output, program, arguments))
    process.start()
    return process


def _script(script: str, arguments: list[str], cwd: str) -> None:
    os.chdir(cwd)
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _command(arguments: list[str]) -> None:
    from hf_msae.cli.main import main

    main(arguments)


def _one(environment: dict[str, str], output: str, program: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """One of the processes."""
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()  # what was imported before stays, and need not be looked through again
    try:
        program(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _wait_for(started: list[BaseProcess]) -> int:
    """Until all have ended, or one has failed."""
    running = {process.sentinel: process for process in started}
    status = 0
    while running:
        ended = wait(list(running), timeout=HANG_SECONDS)
        status = status or next((code for one in ended if (code := running[one].exitcode)), 0 if ended else 1)
        if status:
            for process in running.values():
                process.kill()
        running = {sentinel: one for sentinel, one in running.items() if sentinel not in ended} if not status else {}
    for process in started:
        process.join()
    return status
