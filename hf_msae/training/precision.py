"""In which precision an SAE's matrix products run: the fastest that training bears, chosen by the device, and said.

Weights, gradients and Adam's averages are float32 in any case. On a GPU the products take most of a step, and in
bfloat16 they take about an eighth of the time that they take in float32 without TF32 (989 against 67 TFLOP/s on an
H100's data sheet, half of that against half of this in practice).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from hf_msae.training.arguments import SAETrainingArguments

# The first generation of NVIDIA's GPUs with TF32: Ampere.
TF32_CAPABILITY = (8, 0)


def with_precision(
    args: SAETrainingArguments, device: torch.device, then: Mapping[str, Any] | None = None
) -> SAETrainingArguments:
    """The arguments with what they leave open: bfloat16 where a GPU has it, else TF32 where it has that.

    Args:
        args: How to train; `bf16` and `tf32` may be None.
        device: The run's.
        then: The arguments of the checkpoint that the run goes on from, whose precision stays.

    Returns:
        The arguments, in which both are true or false.
    """
    recorded = {name: value for name, value in (then or {}).items() if name in ("bf16", "tf32")}
    bf16 = args.bf16 if args.bf16 is not None else recorded.get("bf16", _has_bf16(device))
    tf32 = args.tf32 if args.tf32 is not None else recorded.get("tf32", not bf16 and _has_tf32(device))
    return replace(args, bf16=bf16, tf32=tf32)


def describe_precision(args: SAETrainingArguments) -> str:
    """In words, such as "bfloat16 (--no-bf16 for TF32)"."""
    if args.bf16:
        return "bfloat16 over float32 weights (--no-bf16 refuses it)"
    return "TF32 (--no-tf32 refuses it)" if args.tf32 else "float32"


@contextmanager
def products(args: SAETrainingArguments, device: torch.device) -> Iterator[None]:
    """TF32 within this context, where the run has it; other products, the language model's too, stay as they are.

    Args:
        args: How to train.
        device: The run's.
    """
    if not args.tf32 or device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _has_bf16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16, and does not only imitate it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _has_tf32(device: torch.device) -> bool:
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= TF32_CAPABILITY
