"""How many threads compute, where others may keep the cores busy."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Trial products that tell how many threads are worth it, and their sizes, which are about those of a training step.
NUM_TRIALS, TRIAL = 20, (1024, 128, 1024)
# Whoever sets one of these has said how many threads there are to be.
SAID_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def take_free_cores() -> None:
    """Compute with one thread from now on where others keep the cores busy, unless a number of threads was asked for.

    Threads of a product wait for each other, at the end of each. Where one of them has to wait for its core, all do,
    some thousand times a second: two threads on two cores that others use were four times slower than one.
    """
    import torch

    threads = torch.get_num_threads()
    if threads == 1 or any(name in os.environ for name in SAID_BY) or not _one_is_faster(threads):
        return
    torch.set_num_threads(1)
    print(
        f"The cores are busy with other work: one thread, as {threads} would wait for each other "
        f"(OMP_NUM_THREADS={threads} takes them all the same).",
        file=sys.stderr,
    )


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
