"""Ctrl-C and SIGTERM, noticed at once and acted upon between two steps, by all processes after the same one.

A signal in the middle of a step would leave weights of one step beside the optimizer state of another. So it only
raises a flag. A second Ctrl-C interrupts for good, unless it follows at once: launchers pass on to their processes a
Ctrl-C that the terminal has already sent to all of them.
"""

import signal
import threading
import time
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

from hf_msae.errors import HfMsaeError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A second Ctrl-C sooner than this is taken for an echo of the first.
ECHO_SECONDS = 2.0


class TrainingInterrupted(HfMsaeError, RuntimeError):
    """The run was told to stop, and has saved a checkpoint. `exit_code` is what shells expect of that signal."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class InterruptFlag:
    """While this context is open, `signal_number` says which signal asked to stop, None if none did.

    Python delivers signals to the main thread only; a trainer that runs in another one cannot be interrupted like
    this.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.signal_number: int | None = None
        self._first = 0.0
        self._previous: dict[int, object] = {}
        self._parallel = accelerator.num_processes > 1
        # By way of the CPU, so that no step waits for the device's queue to be worked off.
        self._group = torch.distributed.new_group(backend="gloo") if self._parallel else None

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
        now = time.monotonic()
        if self.signal_number is None:
            self.signal_number, self._first = number, now
        elif number == signal.SIGINT and now - self._first > ECHO_SECONDS:
            raise KeyboardInterrupt

    def agreed(self) -> int | None:
        """The signal that any of the processes got; all ask after every step, so that all stop after the same one."""
        if not self._parallel:
            return self.signal_number
        flag = torch.tensor(self.signal_number or 0)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(flag) or None
