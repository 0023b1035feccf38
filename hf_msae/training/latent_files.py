"""Safetensors files whose tensors have a row for each latent, written from one process or from many to one.

Each process holds some rows, in the order of the processes. The first writes them as they arrive, so no process ever
holds the whole; and the file is the same whatever their number, so a run goes on with another. (safetensors' own
`save_file` wants all of a file in memory. The format is a length, a header in JSON, and the numbers.)
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from safetensors import safe_open
from torch import Tensor

from hf_msae.modeling.selection import ProcessGroup
from hf_msae.training.collectives import row_pieces

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}


def write_latent_file(
    path: Path | None, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor], num_latents: int, ranks: ProcessGroup
) -> None:
    """Write a safetensors file; every process calls this at the same time, the first with a path.

    Args:
        path: the file; None sends this process's rows only.
        rows: this process's rows of tensors (num_latents, ...).
        shared: tensors that every process has; those of the first are written.
        num_latents: rows of all processes together.

    Raises the first `OSError` of writing, once all that the other processes send was taken.
    """
    failure: OSError | None = None
    with _opened(path) as file:
        if file is not None:
            shapes = {name: (tensor.dtype, [num_latents, *tensor.shape[1:]]) for name, tensor in rows.items()}
            shapes |= {name: (tensor.dtype, list(tensor.shape)) for name, tensor in shared.items()}
            file.write(_header(shapes))
        for tensor in rows.values():
            for piece in row_pieces(tensor.detach(), ranks):
                failure = failure or _write(file, piece)
        for tensor in shared.values():
            failure = failure or _write(file, tensor.detach())
    if failure is not None:
        raise failure


@contextmanager
def _opened(path: Path | None) -> Iterator[IO[bytes] | None]:
    if path is None:
        yield None
    else:
        with path.open("wb") as file:
            yield file


def _header(shapes: Mapping[str, tuple[torch.dtype, list[int]]]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (dtype, shape) in shapes.items():
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: IO[bytes] | None, tensor: Tensor) -> OSError | None:
    """Write a tensor's numbers; the error, if that fails, because others are still sending."""
    if file is None:
        return None
    try:
        file.write(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    except OSError as error:
        return error
    return None


def read_latent_file(path: Path, first: int, stop: int, num_latents: int) -> dict[str, Tensor]:
    """The tensors of a file: rows `first` to `stop` of those with a row for each of the latents, all of others."""
    tensors = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            part = file.get_slice(name)
            # b_dec alone has no row for each latent, and may be as long as there are latents.
            has_rows = name != "b_dec" and part.get_shape()[:1] == [num_latents]
            # A copy, because a part of a mapped file begins anywhere, on which the last bits of products depend.
            tensors[name] = (part[first:stop] if has_rows else part[:]).clone()
    return tensors
