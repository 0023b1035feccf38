"""The files of an activation cache: where they lie, and what they must hold to be read.

A cache is a folder that others may have written or damaged, so its index is checked as a whole before anything that it
says is believed: names lead nowhere else, numbers are numbers, and every shard holds what the index says of it.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

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
from hf_msae.sites import Site

FORMAT = "hf_msae.activations"
VERSION = 1
SHARD_NAME = re.compile(r"activations-\d{5,}\.safetensors")


class CacheError(InputError):
    """An activation cache that is missing, incomplete or damaged, or lacks what was asked of it."""


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
    index = read_contents(directory / INDEX, CacheError, "the cache")
    if index.get("version") != VERSION:
        raise CacheError(
            f"the activation cache {directory} has version {index.get('version')!r:.20}, this hf_msae reads "
            f"{VERSION}; write it anew"
        )
    # A version of hf_msae before limits were recorded wrote none.
    limits = {"norm_limits": _are_limits} if "norm_limits" in index else {}
    check_contents(index, directory / INDEX, {**_CONTENTS, **limits}, CacheError, "the cache")
    if not index["shards"]:
        raise CacheError(f"{directory / INDEX} names no shards; write the cache anew")
    for shard in index["shards"]:
        _check_shard(directory / shard["file"], shard["num_tokens"], index["hidden_sizes"])
    return index


def read_progress(path: Path) -> dict[str, Any]:
    """What a run that wrote part of a cache has left. Raises `CacheError` where it is damaged."""
    progress = read_contents(path, CacheError, "the cache")
    checks = {**_CONTENTS, "settings": is_mapping, "stream": is_mapping}
    check_contents(progress, path, checks, CacheError, "the cache")
    return progress


def _check_shard(path: Path, num_tokens: int, hidden_sizes: Mapping[str, int]) -> None:
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
    return are_shards(value, SHARD_NAME, "num_tokens", least=1)


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
