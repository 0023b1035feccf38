# Copyright 2026 The hf_msae authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What follows from where tensors are: how small things get there, and whether Triton's kernels run there.

On a GPU the CPU should only ask, never wait: a launch takes microseconds, and while it waits for a number it asks for
nothing. A step waits twice, for the number of candidates and for that of dead latents. All else that it needs of the
CPU travels from pinned memory (`sent`), for which nobody waits.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers.utils import is_triton_available, logging

logger = logging.get_logger(__name__)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on another device; to a GPU from pinned memory, which does not wait for the queue before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def constants(values: Sequence[float], like: Tensor) -> Tensor:
    """A few numbers (n,) of the type of a tensor, and where it is; a GPU keeps them, so that they travel once.

    They must not be changed. Numbers of one step alone are `sent`.
    """
    if like.device.type != "cuda":
        return torch.tensor(values, dtype=like.dtype, device=like.device)
    return _kept_constants(tuple(values), like.dtype, like.device)


@lru_cache(maxsize=128)
def _kept_constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Waits until they are there: another stream may be the next to ask.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def has_kernels(table: Tensor) -> bool:
    """Whether the kernels of `triton_ops` and `triton_rows` take this table."""
    return table.is_cuda and table.dtype != torch.float64 and runs_kernels(table.device)


@lru_cache
def runs_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels compile on this machine, run on a device and agree with torch; tried once.

    Triton compiles at the first launch, with a C compiler and Python's headers, which slim images lack. A run must not
    end there: it is told once, and goes on with torch's own operations.
    """
    if not is_triton_available():
        return False
    try:
        from .triton_ops import check_kernels as check_sums
        from .triton_rows import check_kernels as check_rows

        check_sums(device)
        check_rows(device)
    except Exception as error:  # whatever a compiler, a linker or a driver does
        reason = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning(
            "Triton's kernels do not work on %s, so training there takes torch's own operations, which are slower. "
            "(%s) Triton needs a C compiler and Python's headers: apt-get install gcc python3-dev, or what your "
            "system calls them; else update triton and the GPU's driver.",
            device,
            reason[-1][:300],
        )
        return False
    return True
