"""How much memory this machine has for models."""

import os
from pathlib import Path

import torch

from msae_space.zerogpu import find_zerogpu

# What a container may use, where it may not use all that the machine has: control groups, version 2 and 1.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def machine_bytes() -> int:
    """Of the GPU where models lie on one, else of the machine or its container."""
    if torch.cuda.is_available() and find_zerogpu() is None:
        return int(torch.cuda.get_device_properties(0).total_memory)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([there, *(limit for path in LIMITS if (limit := _limit(path)) is not None)])


def _limit(path: Path) -> int | None:
    try:
        words = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(words) if words.isdecimal() else None  # "max" is none
