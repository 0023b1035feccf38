"""PyTorch's `.pt` files, read without running what is in them.

A `.pt` file is a pickle, and unpickling runs whatever code the file names. PyTorch's own restricted reader
(`weights_only=True`) takes tensors and plain containers and refuses everything else before it runs; nothing else is
ever used here, and there is no switch to turn that off.
"""

import pickle
import re
from typing import Any

import torch

from hf_msae.formats.common import Files, FormatError, plain_names

_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")


def read_pt(files: Files, name: str) -> dict[str, Any]:
    """The dictionary in a `.pt` file, its tensors on the CPU.

    Raises `FormatError` for a file with code in it, which is not run; for one that is truncated or corrupt; and for
    one that holds something other than a dictionary.
    """
    path = files.path(name)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        refused = _REFUSED_GLOBAL.search(str(error))
        if refused is not None:
            raise FormatError(
                f"{name} of {files} is a pickle that would run {refused[1]} on being read, so it was not read. Ask "
                "its author for plain tensors (safetensors, or torch.save of a state_dict()); only where you trust "
                "the author, convert it yourself with torch.load(..., weights_only=False)."
            ) from None
        raise FormatError(
            f"{name} of {files} ({path.stat().st_size:,} bytes) is no whole PyTorch file of plain tensors "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); fetch it again."
        ) from None
    if not isinstance(content, dict):
        raise FormatError(
            f"{name} of {files} should hold a dictionary of tensors, but holds a {type(content).__name__}. Save the "
            "SAE's state_dict() and try again."
        )
    return plain_names(content)
