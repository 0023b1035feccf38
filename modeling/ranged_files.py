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
"""Parts of safetensors files, wherever they lie: what is where in one, and reading it over HTTP by ranges.

All requests go through huggingface_hub's own session, so that proxies, certificates and offline mode hold here too.
Its retries are used as they are, but for every failure of the connection: which of them it tries again by itself
differs between its versions. Redirects that never end are no such failure.

A header is believed only where its tensors are the file, each byte once: what is asked for is then never more than the
file.
"""

import json
import math
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants
from huggingface_hub.utils import hf_raise_for_status, http_backoff, http_stream_backoff, httpx, tqdm
from safetensors import SafetensorError, safe_open

from .untrusted import SAEError, SAEReplyError, parse_json

# A broken connection costs at most this many bytes twice; it is what huggingface_hub itself reads at a time.
CHUNK = 10 * 1024 * 1024
# Enough for the header of any checkpoint of ours, so that most are read by one request.
FIRST_READ = 4096
# An SAE has seven tensors; safetensors itself would allow 100 MB.
MAX_HEADER = 1 << 20
# Requests for an SAE's tensors where they are small. Two ranges are most of it, the first rows of W_dec and of W_enc;
# between those of the other tensors lie some bytes per latent, less than a thousandth of the file.
MAX_RANGES = 4
# What a storage answers when the address that it was asked by holds no longer.
EXPIRED = (401, 403, 404, 410)
# Bytes of one number, by the names that safetensors gives.
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2"), 1),
}


class TensorSpan(NamedTuple):
    """Where a tensor lies in a safetensors file: its bytes are from `start` to `stop` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start


def damaged(where: str, problem: str) -> SAEError:
    """The error for a file that was cut short or is no safetensors file."""
    return SAEError(
        f"{where} is not a complete safetensors file: {problem}. Save or upload it again; if only the copy on this "
        "machine is damaged, load with force_download=True."
    )


def read_spans(read: Callable[[int, int], bytes], size: int, where: str) -> list[TensorSpan]:
    """The tensors of a safetensors file of `size` bytes, in the order of the file; `read(start, stop)` gives bytes.

    Raises `ValueError` where the header is damaged, or its tensors are not the rest of the file, one after the other.
    """
    if size < 8:
        raise damaged(where, f"it has {size} bytes, fewer than the 8 in which one begins")
    end = 8 + int.from_bytes(read(0, 8), "little")
    if end > min(size, MAX_HEADER):
        raise damaged(where, f"its first 8 bytes announce a header up to byte {end:,}, and it has {size:,} bytes")
    try:
        header = parse_json(read(8, end), "its header")
        spans = [_span(name, entry, end) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(where, f"its header cannot be read ({error})") from error
    described = max((span.stop for span in spans), default=end)
    if described != size:
        raise damaged(where, f"its header describes {described:,} bytes, and it has {size:,}")
    spans.sort(key=lambda span: (span.start, span.stop))
    for span, start in zip(spans, [end, *(span.stop for span in spans)], strict=False):
        if span.start != start:
            raise damaged(where, f"{span.name} begins at byte {span.start:,} and not where the one before ends")
    return spans


def _span(name: str, entry: Any, data_start: int) -> TensorSpan:
    start, stop = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if dtype not in ITEM_BYTES or any(type(number) is not int or number < 0 for number in (start, stop, *shape)):
        raise SAEError(f"{name} is said to be {dtype} of shape {shape} from {start} to {stop}")
    if stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise SAEError(f"{name}, {dtype} of shape {shape}, does not take the bytes from {start} to {stop}")
    return TensorSpan(name, dtype, shape, data_start + start, data_start + stop)


def format_header(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> bytes:
    """Write the beginning of a safetensors file.

    Args:
        tensors: Names, dtypes as safetensors calls them, and shapes, in the order of the file.

    Returns:
        The length of the header, and the header.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as safetensors aligns them
    return len(text).to_bytes(8, "little") + text


def merge_ranges(spans: Sequence[TensorSpan], most: int) -> list[tuple[int, int]]:
    """Join spans of a file into few ranges, with the smallest gaps between spans filled.

    Args:
        spans: In the order of the file.
        most: How many ranges there may be.

    Returns:
        Bytes from and to of each range.
    """
    ranges = [(span.start, span.stop) for span in spans if span.size]
    while len(ranges) > 1:
        gaps = [right[0] - left[1] for left, right in pairwise(ranges)]
        if len(ranges) <= most and min(gaps) > 0:
            break
        index = gaps.index(min(gaps))
        ranges[index : index + 2] = [(ranges[index][0], ranges[index + 1][1])]
    return ranges


@dataclass(frozen=True)
class RemoteFile:
    """A file of `size` bytes at an address that honours ranges; `etag` names its content, and can name a folder.

    `head` are its first bytes. `location` is where the address leads: a storage whose addresses hold for a while, so
    that each range is one request and not two.
    """

    url: str
    headers: dict[str, str]
    etag: str
    size: int
    where: str
    location: str
    head: bytes

    @classmethod
    def find(cls, url: str, headers: dict[str, str], where: str) -> "RemoteFile | None":
        """Ask for the first bytes, to learn the rest; None where the server ignores ranges.

        Raises `EntryNotFoundError` and the other errors of huggingface_hub.
        """
        headers = {**headers, "Accept-Encoding": "identity"}
        asking = {**headers, "Range": f"bytes=0-{FIRST_READ - 1}"}
        # Streamed, so that a server that would send all of it is stopped in time.
        with http_stream_backoff(
            "GET",
            url,
            headers=asking,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=httpx.TransportError,
        ) as response:
            head = response.read() if response.status_code == 206 else b""
        if response.status_code == 416:
            raise damaged(where, "it is empty")
        hf_raise_for_status(response)
        sent = re.fullmatch(r"bytes 0-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
        # The Hub's name of the content is on its redirect; the storage behind has names of its own.
        linked = [step.headers.get("X-Linked-Etag") for step in [*response.history, response]]
        etag = next((name for name in linked if name), response.headers.get("ETag", ""))
        etag = re.sub(r"[^\w-]", "", etag.removeprefix("W/"))
        if response.status_code != 206 or sent is None or len(head) != int(sent[1]) + 1 or not etag:
            return None
        return cls(url, headers, etag, int(sent[2]), where, str(response.url), head)

    def read(self, start: int, stop: int) -> bytes:
        """Its bytes from `start` to `stop`; retried for half a minute.

        Raises `OSError` where the server sends anything else.
        """
        if stop <= len(self.head):
            return self.head[start:stop]
        response = self._ask(self.location, start, stop)
        if response.status_code in EXPIRED and self.location != self.url:
            response = self._ask(self.url, start, stop)
        hf_raise_for_status(response)
        sent = (response.status_code, response.headers.get("Content-Range"), len(response.content))
        right = (206, f"bytes {start}-{stop - 1}/{self.size}", stop - start)
        if sent != right:
            raise SAEReplyError(
                f"Asked for {right[1]} of {self.where}, the server sent status {sent[0]}, Content-Range {sent[1]} and "
                f"{sent[2]:,} bytes. Try again; if that does not help, load without prefix=."
            )
        return response.content

    def _ask(self, url: str, start: int, stop: int) -> Any:
        headers = {**self.headers, "Range": f"bytes={start}-{stop - 1}"}
        if httpx.URL(url).netloc != httpx.URL(self.url).netloc:
            # The token is the Hub's alone.
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        return http_backoff(
            "GET",
            url,
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=httpx.TransportError,
        )

    def read_spans(self) -> list[TensorSpan]:
        """As `read_spans`, mostly without a request."""
        return read_spans(self.read, self.size, self.where)

    def save(self, spans: Sequence[TensorSpan], path: Path) -> None:
        """Write a safetensors file of (parts of) tensors, in the order of the file; a failure leaves nothing."""
        size = sum(span.size for span in spans)
        path.parent.mkdir(parents=True, exist_ok=True)
        # As hf_msae.atomic_files does it, which a reader of these files may not have.
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            with open(draft, "wb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as progress:
                file.write(format_header((span.name, span.dtype, span.shape) for span in spans))
                for part in self._parts(spans):
                    progress.update(file.write(part))
            with safe_open(draft, framework="pt"):
                """Opening checks that shapes and sizes agree."""
            os.replace(draft, path)
        except SafetensorError as error:
            raise damaged(self.where, str(error)) from error
        finally:
            draft.unlink(missing_ok=True)

    def _parts(self, spans: Sequence[TensorSpan]) -> Iterator[bytes]:
        """The bytes of the spans, one after the other, in parts."""
        for first, last in merge_ranges(spans, MAX_RANGES):
            for start in range(first, last, CHUNK):
                stop = min(start + CHUNK, last)
                content = self.read(start, stop)
                for span in spans:
                    low, high = max(start, span.start), min(stop, span.stop)
                    if low < high:
                        yield content[low - start : high - start]
