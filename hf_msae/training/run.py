"""What every part of a run stands on: the trackers, what `accelerate launch` was told, and the signals that end it.

A run takes from the launcher what means something here, and says of the rest, in a line each, that it has no effect.

A signal in the middle of a step would leave weights of one step beside the optimizer state of another. So Ctrl-C and
SIGTERM only raise a flag, which is acted upon between two steps, by all processes after the same one. A second Ctrl-C
interrupts for good, unless it follows at once: launchers pass on to their processes a Ctrl-C that the terminal has
already sent to all of them.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType, broadcast_object_list

from hf_msae.errors import HfMsaeError, InputError
from hf_msae.training.arguments import SAETrainingArguments

logger = logging.getLogger(__name__)

# Trackers whose package has another name.
PACKAGES = {"comet_ml": "comet-ml"}
# How accelerate may run processes that leaves a learner's own work as it is.
PLAIN = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A second Ctrl-C sooner than this is taken for an echo of the first.
ECHO_SECONDS = 2.0


def check_trackers(names: Sequence[str]) -> None:
    """Raises `ValueError` for a tracker that is unknown, or whose package is not installed: accelerate would go on
    without it, and without a word.
    """
    available = {str(tracker.value) for tracker in get_available_trackers()}
    for name in names:
        if name != "all" and name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))
            raise InputError(f"report_to names {name!r}, which is no tracker. Known: {known}; all; none.")
        if name != "all" and name not in available:
            raise InputError(
                f"report_to names {name!r}, which is not installed here: pip install {PACKAGES.get(name, name)}, or "
                "leave it out."
            )


def as_launched(args: SAETrainingArguments, accelerator: Accelerator) -> SAETrainingArguments:
    """The arguments with what `accelerate launch`, or its configuration file, asks for."""
    said = []
    precision = accelerator.mixed_precision
    if precision == "bf16" and not args.bf16:
        args = replace(args, bf16=True)
        said.append("the SAE's matrix products run in bfloat16 (--mixed_precision bf16), as with --bf16")
    elif precision not in ("no", "bf16"):
        said.append(
            f"--mixed_precision {precision} has no effect: an SAE trains in float32, or, with --bf16, bfloat16"
        )
    micro_batches = accelerator.gradient_accumulation_steps
    if micro_batches not in (1, args.gradient_accumulation_steps):
        said.append(
            f"--gradient_accumulation_steps {micro_batches} before the command has no effect; give it to the command"
        )
    if accelerator.distributed_type not in PLAIN:
        said.append(
            f"{accelerator.distributed_type.value} has no effect: each process has a whole SAE, or, with "
            "--shard-latents, some of its latents"
        )
    if accelerator.is_main_process:
        for words in said:
            logger.warning("From accelerate's launcher: %s.", words)
    return args


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


Result = TypeVar("Result")


def on_main(accelerator: Accelerator, compute: Callable[[], Result]) -> Result:
    """What the main process computes, on all processes. Its `ValueError` is raised by all, so that none waits."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = compute()
        except ValueError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
