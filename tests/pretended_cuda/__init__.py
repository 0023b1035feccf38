"""A pretended GPU: tensors of the CPU that say they are on `cuda:0`, and a record of what a real one would wait for.

Within `pretended_cuda()`, whatever is made on or moved to `DEVICE` is a `PretendedTensor`. Numbers are the CPU's; what
is checked is where things are:

- an operation that mixes devices raises `MixedDevices`, where CUDA would;
- everything for which the CPU waits for the device is in `syncs`: numbers read from it, sizes that depend on data, and
  copies between the two that are not from pinned memory without waiting;
- operations that add floats in no fixed order on CUDA are in `nondeterministic`;
- `operations` counts what is asked of the device: about the launches, where one operation is one kernel.

What is pretended ends at torch's Python. A CPU build of torch cannot do backward passes on CUDA tensors, so its C++
believes these to be on the CPU, and the few methods in which C++ would act on that (`to`, `cpu`, `tolist`,
`new_tensor`, ...) are written here again. Autocast for "cuda" is that for "cpu", with float32 or bfloat16. Streams do
nothing. Triton's kernels take such tensors in its interpreter (`interpreted_kernels`).
"""

from pretended_cuda.device import DEVICE, Event, MixedDevices, PretendedCuda, PretendedTensor, pretended_cuda
from pretended_cuda.kernels import interpreted_kernels

__all__ = [
    "DEVICE",
    "Event",
    "MixedDevices",
    "PretendedCuda",
    "PretendedTensor",
    "interpreted_kernels",
    "pretended_cuda",
]
