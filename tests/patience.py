"""How long a test waits for what must come: until it comes.

A test that fails because the machine was busy says nothing about the code. So there is one limit for all tests, far
above what any of them takes, which only ends one that hangs; `tests/test_patience.py` finds every other.
"""

import sys
import time
from collections.abc import Callable

# After this a test hangs.
HANG_SECONDS = 3600
# For something that may or may not happen meanwhile, where both are right: the test only gives it the chance.
A_MOMENT = 1.0


def until(condition: Callable[[], object], otherwise: Callable[[], object] = lambda: "it never came") -> None:
    """Returns as soon as the condition holds; `otherwise` says what was there instead where it never does."""
    hangs = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < hangs, otherwise()
        time.sleep(0.01)


def calls_of(work: Callable[[], object]) -> int:
    """How many functions, Python's and C's, the work calls: what it costs, on every machine alike."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls
