"""The files of an activation cache: where they lie, and what they must hold to be read.

A cache is a folder that others may have written or damaged, so its index is checked as a whole before anything that it
says is believed: names lead nowhere else, numbers are numbers, and every shard holds what the index says of it.

Files may also come from elsewhere while they are read: `CacheFiles` is all that a reader asks of the place.
"""

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_msae.data.fingerprints import of_digests, of_files
from hf_msae.data.unfinished import (
    INDEX,
    MAX_INDEX_BYTES,
    PROGRESS,
    are_shards,
    check_contents,
    is_mapping,
    read_contents,
    unfinished_folder,
)
from hf_msae.errors import InputError
from hf_msae.modeling.untrusted import read_json
from hf_msae.quantization import QUANTIZATIONS
from hf_msae.sites import Site

FORMAT = "hf_msae.activations"
VERSION = 1
SHARD_NAME = re.compile(r"activations-\d{5,}\.safetensors")
SHA256 = re.compile(r"[0-9a-f]{64}")


# What fingerprints call it.
KIND = "an activation cache"


class CacheError(InputError):
    """An activation cache that is missing, incomplete or damaged, or lacks what was asked of it."""


class CacheFiles(ABC):
    """Where the files of a cache come from.

    Attributes:
        directory: Where they lie on this machine once they are here.
        description: What a person would call the cache.
        commit: Of a cache that others may write anew while it is read, which one of its states is read.
    """

    directory: Path
    description: str
    commit: str | None = None

    @abstractmethod
    def read_index(self) -> dict[str, Any]:
        """The index, checked, and the shards with it as far as that needs none of them whole.

        Raises:
            CacheError: There is no complete cache, it is of another version, or it is damaged.
        """

    @abstractmethod
    def shard(self, name: str) -> Path:
        """A shard, which is here when this returns. Raises `CacheError` where it cannot be had, or is damaged."""

    @abstractmethod
    def expect(self, names: Sequence[str]) -> None:
        """Hear which shards are read next, in their order."""

    @abstractmethod
    def at_commit(self, commit: str | None) -> "CacheFiles":
        """The same place in a state of it, which another process may have found."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What tells this cache from others, wherever it lies."""


class CacheFolder(CacheFiles):
    """A cache in a folder of this machine.

    Args:
        directory: The folder.
        description: What a person would call the cache, if not by its folder.
    """

    def __init__(self, directory: Path, description: str | None = None) -> None:
        self.directory, self.description = directory, description or f"the activation cache {directory}"

    def read_index(self) -> dict[str, Any]:
        """The index, of a cache whose shards are all there; only their headers are read."""
        return read_index(self.directory)

    def shard(self, name: str) -> Path:
        """Where it lies."""
        return self.directory / name

    def expect(self, names: Sequence[str]) -> None:
        """All are there."""

    def at_commit(self, commit: str | None) -> "CacheFolder":
        """The folder itself, which has one state."""
        return self

    def fingerprint(self) -> dict[str, Any]:
        """What tells this cache from others, wherever it lies; as `data.fingerprint` does of documents."""
        index = self.read_index()
        recorded = fingerprint_of_index(index)
        if recorded is not None:
            return recorded
        shards = [self.directory / shard["file"] for shard in index["shards"]]
        return {"kind": KIND, **of_files([self.directory / INDEX, *shards])}


def fingerprint_of_index(index: Mapping[str, Any]) -> dict[str, Any] | None:
    """What tells a cache from others by what its index records of the shards.

    Args:
        index: Of the cache.

    Returns:
        None where an older version wrote it, which recorded nothing of what they hold.
    """
    digests = [shard.get("sha256") for shard in index["shards"]]
    return None if None in digests else {"kind": KIND, **of_digests(digests)}


def sha256_of_file(path: Path) -> str:
    """The digest by which the Hub, too, knows a large file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def is_activation_cache(path: str | Path) -> bool:
    """Whether a folder holds a complete activation cache, damaged or not."""
    index = Path(path) / INDEX
    if not index.is_file():
        return False
    try:
        return read_json(index, max_bytes=MAX_INDEX_BYTES).get("format") == FORMAT
    except ValueError:
        # What lies beside it tells what it was.
        return any(SHARD_NAME.fullmatch(file.name) for file in Path(path).iterdir())


def shard_name(number: int) -> str:
    """The name of a cache's file by its number."""
    return f"activations-{number:05d}.safetensors"


def read_index(directory: Path) -> dict[str, Any]:
    """The index of a complete cache whose shards are all there; only their headers are read.

    Raises:
        CacheError: There is no complete cache, it is of another version, or it is damaged.
    """
    if not is_activation_cache(directory):
        if (unfinished_folder(directory) / PROGRESS).exists():
            raise CacheError(
                f"the activation cache {directory} is incomplete (it lies in {unfinished_folder(directory)}); call "
                "cache_activations again with the same settings to finish it"
            )
        raise CacheError(f"no activation cache at {directory}; cache_activations makes one")
    index = read_index_file(directory / INDEX, str(directory))
    for shard in index["shards"]:
        check_shard(directory / shard["file"], shard["num_tokens"], index["hidden_sizes"])
    return index


def read_index_file(path: Path, called: str) -> dict[str, Any]:
    """The index alone, checked.

    Args:
        path: Of the file.
        called: What a person calls the cache.

    Raises:
        CacheError: It is of another version, or damaged.
    """
    index = read_contents(path, CacheError, "the cache")
    if index.get("version") != VERSION:
        raise CacheError(
            f"the activation cache {called} has version {index.get('version')!r:.20}, this hf_msae reads "
            f"{VERSION}; write it anew"
        )
    # Versions of hf_msae before these were recorded wrote none.
    later = {name: check for name, check in _LATER_CONTENTS.items() if name in index}
    check_contents(index, path, {**_CONTENTS, **later}, CacheError, "the cache")
    if not index["shards"]:
        raise CacheError(f"{path} names no shards; write the cache anew")
    return index


def read_progress(path: Path) -> dict[str, Any]:
    """What a run that wrote part of a cache has left. Raises `CacheError` where it is damaged."""
    progress = read_contents(path, CacheError, "the cache")
    checks = {**_CONTENTS, "settings": is_mapping, "stream": is_mapping}
    check_contents(progress, path, checks, CacheError, "the cache")
    return progress


def check_shard(path: Path, num_tokens: int, hidden_sizes: Mapping[str, int]) -> None:
    """Raise `CacheError` where a shard is not there, or does not hold what the index says; its header is read."""
    expected = {site: [num_tokens, hidden_size] for site, hidden_size in hidden_sizes.items()}
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"the shard {path} is missing or damaged ({error}); write the cache anew") from error
    if found != expected:
        raise CacheError(f"the shard {path} holds {found}, its index says {expected}; write the cache anew")


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _are_shards(value: Any) -> bool:
    return are_shards(value, SHARD_NAME, "num_tokens", least=1) and all(
        "sha256" not in shard or (isinstance(shard["sha256"], str) and SHA256.fullmatch(shard["sha256"]) is not None)
        for shard in value
    )


def _are_widths(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_site(site) and _is_count(width) for site, width in value.items())


def _are_limits(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_site(site) and type(limit) in (int, float) and 0 <= limit < math.inf for site, limit in value.items()
    )


def _is_site(name: str) -> bool:
    try:
        return bool(Site.parse(name))
    except InputError:
        return False


_CONTENTS: dict[str, Callable[[Any], bool]] = {
    "shards": _are_shards,
    "hidden_sizes": _are_widths,
    "dtypes": is_mapping,
}

_LATER_CONTENTS: dict[str, Callable[[Any], bool]] = {
    "norm_limits": _are_limits,
    "quantization": lambda value: value in (None, *QUANTIZATIONS),
}
