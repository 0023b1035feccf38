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
"""What comes from outside, checked before it is used: names that are joined to folders, JSON, shapes and numbers.

A checkpoint is written by others. Its configuration is compared with what its file holds before any memory is asked
for, so that loading never takes more than the file; and every number is looked at once.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Tensors with a row per latent, and those that all latents share: the last two of a transcoder with a skip and of a
# tokenized SAE, which has a row per token.
PER_LATENT = ("W_enc", "b_enc", "W_dec", "threshold", "max_activation", "firing_rate")
SHARED_TENSORS = ("b_dec", "W_skip", "W_token")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# A configuration or an index of files has some kilobytes.
MAX_JSON_BYTES = 1 << 20
NUM_SHOWN = 8
# What numbers that are no weights may be; inclusive.
RANGES = {"threshold": (0.0, math.inf), "max_activation": (0.0, math.inf), "firing_rate": (0.0, 1.0)}


class SAEError(ValueError):
    """A configuration, a file or an argument that no SAE can be made of. The message says what to do."""


class SAENotFoundError(SAEError, FileNotFoundError):
    """A folder or repo lacks a file of an SAE."""


class SAEReplyError(SAEError, OSError):
    """A server sent something else than what was asked of it."""


def inside(name: str, what: str = "subfolder") -> str:
    """A path that may be joined to a folder: relative, without a way out; "" for the folder itself.

    Raises `ValueError` for anything else. `what` says what the name is of.
    """
    parts = name.split("/")
    drive = re.match(r"[A-Za-z]:", name)
    if name.startswith("/") or drive or "\\" in name or ".." in parts or not name.isprintable():
        raise SAEError(
            f"The {what} {name!r} must be a path below the folder or repo that was named, such as layers.12/16k: "
            "without a leading slash or drive, '..', backslashes and control characters."
        )
    return "/".join(part for part in parts if part not in ("", "."))


def parse_json(text: str | bytes, where: str) -> Any:
    """Any JSON. Raises `ValueError` where it is none, or nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        problem = "it is nested too deeply"
    except ValueError as error:  # of the format, the encoding, or a number of thousands of digits
        problem = str(error)
    raise SAEError(f"{where} is no JSON that can be read ({problem}). Save or download it again.")


def read_json(path: str | Path, where: str | None = None, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises `ValueError` where there is none, or more than `max_bytes`."""
    where = str(path) if where is None else where
    size = Path(path).stat().st_size
    if size > max_bytes:
        raise SAEError(f"{where} has {size:,} bytes, where {max_bytes:,} are the most; it is not what it should be.")
    content = parse_json(Path(path).read_bytes(), where)
    if not isinstance(content, dict):
        raise SAEError(f"{where} must hold a JSON object {{...}}, but holds a {type(content).__name__}.")
    return content


def shown(values: Any) -> str:
    """A list for an error message, the first of it where it is long."""
    parts = [str(value) for value in list(values)[:NUM_SHOWN]]
    more = len(values) - len(parts)
    return f"[{', '.join(parts)}{f', and {more:,} more' if more > 0 else ''}]"


def weight_shapes(
    num_latents: int,
    hidden_size: int,
    output_size: int | None = None,
    skip: bool = False,
    lookup_size: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """The tensors of an SAE and their shapes; of a transcoder, where what it writes has a size of its own."""
    output_size = hidden_size if output_size is None else output_size
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(PER_LATENT, (num_latents,))
    shapes |= {"W_enc": (num_latents, hidden_size), "W_dec": (num_latents, output_size), "b_dec": (output_size,)}
    if skip:
        shapes["W_skip"] = (output_size, hidden_size)
    if lookup_size is not None:
        shapes["W_token"] = (lookup_size, output_size)
    return shapes


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str, whole: bool = True
) -> None:
    """Refuse tensors that are not those of an SAE.

    Args:
        found: Shapes by name.
        expected: Shapes that there should be.
        where: What the tensors are of, for the error.
        whole: Whether missing ones are refused, too.

    Raises:
        ValueError: Names the tensors of another shape, those that no SAE has, and the missing ones.
    """
    known = {name: shape for name, shape in found.items() if name in expected}
    problems: dict[str, list] = {
        "missing_keys": sorted(expected.keys() - found.keys()) if whole else [],
        "unexpected_keys": sorted(found.keys() - expected.keys()),
        "mismatched_keys": sorted(
            (name, shape, expected[name]) for name, shape in known.items() if shape != expected[name]
        ),
    }
    words = [f"{kind}: {shown([repr(one) for one in names])}" for kind, names in problems.items() if names]
    if words:
        raise SAEError(
            f"The weights in {where} are not those of a MatryoshkaSAE ({'; '.join(words)}). Check that config.json "
            "and model.safetensors belong together."
        )


def check_values(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are not finite floating-point numbers, and thresholds, maxima and rates that are none.

    Args:
        state: Tensors by name.
        where: What they are of, for the error.

    Raises:
        ValueError: Says which, and what it holds.
    """
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES.values():
            raise SAEError(
                f"{name} in {where} is {str(tensor.dtype).removeprefix('torch.')}; an SAE's numbers are "
                f"{', '.join(DTYPES)}. Convert the weights first: quantised ones cannot be read."
            )
        low, high = (bound.item() for bound in tensor.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise SAEError(
                f"{name} in {where} holds NaN or infinite numbers, with which nothing can be computed. Take a "
                "checkpoint from before the run diverged, or fetch the file again."
            )
        least, most = RANGES.get(name, (-math.inf, math.inf))
        if low < least or high > most:
            raise SAEError(
                f"{name} in {where} goes from {low:g} to {high:g}, but must be from {least:g} to {most:g}. "
                "Save or convert the SAE again."
            )
