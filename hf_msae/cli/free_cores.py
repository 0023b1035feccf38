"""How many threads short runs compute with, where others may keep the cores busy."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

# Trial products that tell how many threads are worth it, and their sizes, which are about those of a training step.
NUM_TRIALS, TRIAL = 20, (1024, 128, 1024)


@contextmanager
def on_free_cores() -> Iterator[None]:
    """While open, compute with one thread where others keep the cores busy.

    Threads of a product wait for each other, at the end of each. Where one of them has to wait for its core, all do,
    some thousand times a second: two threads on two cores that others use were four times slower than one.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        if threads > 1 and _one_is_faster(threads):
            print(f"The cores are busy with other work: one thread, as {threads} would wait for each other.")
            torch.set_num_threads(1)
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
