"""Which documents are held out: those whose contents say so.

A document's hash value is a number from 0 to 1 that its contents fix. Measuring takes the lowest hash values,
calibration the highest, training what is between. So every process, and every later evaluation of the same data, holds
out the same documents, in whatever order and form they are stored; copies of a document are on one side; and text from
all parts of the data is held out.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from hf_msae.data.rows import Chat, Document

SALT = b"hf_msae held out"  # another salt holds out other documents


def hash_value(document: Document) -> float:
    """From 0 (included) to 1 (not included), uniform over documents that differ."""
    if isinstance(document, str):
        contents = document
    else:
        tools = document.tools if isinstance(document, Chat) else None
        contents = json.dumps([document, tools], sort_keys=True, default=lambda other: type(other).__name__)
    # Half a surrogate pair, which JSON may hold, is no character of UTF-8.
    digest = hashlib.blake2b(contents.encode("utf-8", "surrogatepass"), digest_size=8, key=SALT).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


@dataclass(frozen=True)
class Split:
    """Shares of the documents: `measuring` of the lowest hash values, `calibration` of the highest."""

    measuring: float = 0.0
    calibration: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.measuring or self.calibration)

    def holds(self, value: float) -> bool:
        """Whether a document of this hash value is held out."""
        return value < self.measuring or 1 - value <= self.calibration

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


EVERYTHING = Split()
