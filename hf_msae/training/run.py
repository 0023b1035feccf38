"""What every part of a run needs of it: arguments, processes, device and output directory; and how it is interrupted.

A run takes from `accelerate launch` what means something here, and says of the rest, in a line each, that it has no
effect.

A signal in the middle of a step would leave weights of one step beside the optimizer state of another. So Ctrl-C and
SIGTERM only raise a flag, which is acted upon between two steps, by all processes after the same one. A second Ctrl-C
interrupts for good, unless it follows at once: launchers pass on to their processes a Ctrl-C that the terminal has
already sent to all of them.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object

from hf_msae.errors import HfMsaeError, InputError
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.collectives import process_group
from hf_msae.training.precision import with_precision

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

Result = TypeVar("Result")
Item = TypeVar("Item")


class Run:
    """One training run, of one process or of many: what its parts share.

    Args:
        args: How to train. What `accelerate launch` asks for is added to it.
        single: Whether one SAE is trained, whose files then lie in the output directory itself.

    Attributes:
        args: The arguments, with what the launcher asks for.
        single: Whether one SAE is trained.
        output_dir: Where the run writes.
        accelerator: The process's `accelerate.Accelerator`.
        device: This process's device.
        rank: This process's number, from 0.
        num_processes: Processes of the run.
        is_main: Whether this is the process that writes files and logs.
        processes: What the processes do together; alone, each of its operations is the identity.
        tokens_per_step: Activation vectors of a step, of all micro-batches of all processes.

    Raises:
        InputError: For a tracker that is unknown or not installed.
    """

    def __init__(self, args: SAETrainingArguments, single: bool = True) -> None:
        check_trackers(args.report_to)
        self.output_dir, self.single = Path(args.output_dir), single
        self.accelerator = Accelerator(
            cpu=args.on_cpu,
            log_with=args.report_to or None,
            project_dir=str(self.output_dir / "trackers"),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout))],
        )
        self.device: torch.device = self.accelerator.device
        self._asked = as_launched(args, self.accelerator)
        self.args = with_precision(self._asked, self.device)
        self.rank: int = self.accelerator.process_index
        self.num_processes: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        self.processes = process_group(self.accelerator)
        self.tokens_per_step = self.args.tokens_per_step(self.num_processes)

    def keep_precision(self, then: Mapping[str, Any]) -> None:
        """Go on in the precision of a checkpoint's arguments, where this run does not ask for another."""
        self.args = with_precision(self._asked, self.device, then)

    @cached_property
    def graph_pool(self) -> Any:
        """Memory that the CUDA graphs of all SAEs' steps share."""
        return torch.cuda.graph_pool_handle()

    def sae_folder(self, base: Path, name: str) -> Path:
        """Where one SAE's files lie under a folder: in it when it is the only one, else in a folder of its name."""
        return base if self.single else base / name

    def on_main(self, compute: Callable[[], Result]) -> Result:
        """Compute something on the main process, and have it on all.

        Args:
            compute: What the main process does.

        Returns:
            What it gave.

        Raises:
            HfMsaeError: On all processes, where the main one raised it, so that none waits for ever; so with
                `ValueError`.
        """
        if self.num_processes == 1:
            return compute()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = compute()
            except (HfMsaeError, ValueError) as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def broadcast(self, value: Result) -> Result:
        """What the main process has, on all processes."""
        return value if self.num_processes == 1 else broadcast_object_list([value])[0]

    def gather(self, items: list[Item]) -> list[Item]:
        """The items of all processes, in their order."""
        return items if self.num_processes == 1 else gather_object(items)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers without which accelerate would go on, and without a word.

    Args:
        names: As in `report_to`.

    Raises:
        InputError: For a tracker that is unknown, or whose package is not installed.
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
    if precision == "bf16" and args.bf16 is None:
        args = replace(args, bf16=True)
        said.append("the SAE's matrix products run in bfloat16 (--mixed_precision bf16), as with --bf16")
    elif precision == "bf16" and not args.bf16:
        said.append("--mixed_precision bf16 has no effect: --no-bf16 refuses it")
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
    """The run was told to stop, and has saved a checkpoint.

    Attributes:
        exit_code: What shells expect of a process that this signal ended.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class InterruptFlag:
    """While this context is open, `signal_number` says which signal asked to stop, None if none did.

    Python delivers signals to the main thread only; a trainer that runs in another one cannot be interrupted like
    this.
    """

    def __init__(self, run: Run) -> None:
        self.signal_number: int | None = None
        self._first = 0.0
        self._previous: dict[int, Any] = {}
        # By way of the CPU, so that no step waits for the device's queue to be worked off.
        self._group: torch.distributed.ProcessGroup | None = None
        if run.num_processes > 1:
            patience = timedelta(seconds=run.args.ddp_timeout)
            self._group = torch.distributed.new_group(backend="gloo", timeout=patience)

    def __enter__(self) -> "InterruptFlag":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal_number is None:
            self.signal_number, self._first = number, now
        elif number == signal.SIGINT and now - self._first > ECHO_SECONDS:
            raise KeyboardInterrupt

    def agreed(self) -> int | None:
        """The signal that any of the processes got; all ask after every step, so that all stop after the same one."""
        if self._group is None:
            return self.signal_number
        flag = torch.tensor(self.signal_number or 0)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(flag) or None
