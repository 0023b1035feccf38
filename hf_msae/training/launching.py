"""What surrounds a run: the trackers that are installed, and what `accelerate launch` was told.

A run takes from the launcher what means something here, and says of the rest, in a line each, that it has no effect.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType

from hf_msae.errors import InputError
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
