"""How many threads compute, where others may keep the cores busy."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# How long the cores are looked at; the system counts hundredths of a second.
LOOK_SECONDS = 0.2
# What a core that counts as free may do beside.
MAY_BE_BUSY = 0.25
# Trial products that tell whether several threads are worth it, and their sizes, about those of a training step.
NUM_TRIALS, TRIAL = 8, (1024, 128, 1024)
# Whoever sets one of these has said how many threads there are to be.
SAID_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def take_free_cores() -> None:
    """Compute with as many threads as there are free cores from now on, unless a number of threads was asked for.

    Threads of a product wait for each other, at the end of each. Where one of them has to wait for its core, all do,
    some thousand times a second: two threads on two cores of which others use one were three times slower than one,
    and no faster where those others had a lower priority. A container may be given less than the cores that it sees,
    so several threads are also tried beside one.
    """
    import torch

    threads = torch.get_num_threads()
    if threads == 1 or any(name in os.environ for name in SAID_BY):
        return
    wanted = min(threads, max(1, int(_free_cores() + MAY_BE_BUSY)))
    if wanted > 1 and _one_is_faster(wanted):
        wanted = 1
    torch.set_num_threads(wanted)
    if wanted < threads:
        print(
            f"The cores are busy with other work: {wanted} of {threads} threads, which would wait for each other "
            f"(OMP_NUM_THREADS={threads} takes them all the same).",
            file=sys.stderr,
        )


def _free_cores() -> float:
    """How much of the cores on which this process may run nobody uses, in cores."""
    import psutil

    busy = psutil.cpu_percent(interval=LOOK_SECONDS, percpu=True)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(busy))
    return sum(1 - busy[core] / 100 for core in cores if core < len(busy))


@contextmanager
def on_free_cores() -> Iterator[None]:
    """The same while this is open."""
    import torch

    threads = torch.get_num_threads()
    try:
        take_free_cores()
        yield
    finally:
        torch.set_num_threads(threads)


def _one_is_faster(threads: int) -> bool:
    """Whether a product is computed sooner by one thread than by so many; the latter are set when it returns."""
    import torch

    a, b = torch.ones(TRIAL[:2]), torch.ones(TRIAL[1:])
    seconds = {}
    for tried in (1, threads):
        torch.set_num_threads(tried)
        a @ b  # starts the threads
        begin = time.perf_counter()
        for _ in range(NUM_TRIALS):
            a @ b
        seconds[tried] = time.perf_counter() - begin
    return seconds[1] < seconds[threads]
