"""Ctrl-C and SIGTERM, noticed at once and acted upon between two steps.

A signal in the middle of a step would leave weights of one step beside the optimizer state of another. So the first
one only raises a flag; a second Ctrl-C interrupts for good.
"""

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptFlag:
    """While this context is open, `signal_name` says which signal asked to stop, if any did.

    Python delivers signals to the main thread only; a trainer that runs in another one cannot be interrupted like
    this.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "InterruptFlag":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
