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
"""Reading a checkpoint's weights, whole or their first rows: `from_pretrained(..., prefix=m)`.

What the files say they hold is compared with the configuration before anything is read, so that loading takes no more
memory than the files; transformers would make room for whatever the configuration asks for.

`W_enc` and `W_dec` are stored as (num_latents, hidden_size), so the first m latents are the first bytes of each tensor
of a safetensors file. From a folder they are read as slices. From the Hub only those bytes are asked for, by HTTP
range requests, and kept as a small safetensors file of their own beside the Hub's cache:

    <Hub cache>/hf_msae--prefixes/<repo>/<etag>/first-<m>.safetensors
    <Hub cache>/hf_msae--prefixes/<repo>/commits/<commit>/<file>.etag

The etag is that of the whole file's content, so a commit that only edits the card finds what was read before; and the
second kind of file tells it without asking. A larger prefix, or the whole file in the Hub's own cache, serves as well.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import constants, hf_hub_download, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file, logging

from .configuration_matryoshka_sae import MatryoshkaSAEConfig
from .ranged_files import RemoteFile, TensorSpan, damaged, read_spans
from .untrusted import PER_LATENT, SAEError, SAENotFoundError, check_shapes, inside, read_json, shown

logger = logging.get_logger(__name__)

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD = re.compile(r"\w[\w.-]*\.safetensors")
# How a file of first rows begins.
KEPT = "first-"
# Arguments of `from_pretrained` that say where and how a file is found.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def truncate_state(state: Mapping[str, Tensor], prefix: int) -> dict[str, Tensor]:
    """The tensors of the first `prefix` latents."""
    return {name: tensor[:prefix] if name in PER_LATENT else tensor for name, tensor in state.items()}


def read_state(
    source: str | os.PathLike, config: MatryoshkaSAEConfig, prefix: int | None = None, **hub: Any
) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint; what had to be downloaded in part is logged.

    Args:
        source: A folder, or a repo of the Hub.
        config: The configuration of the whole checkpoint.
        prefix: Only the first rows of tensors with a row per latent; all by default.
        hub: Some of `HUB_ARGUMENTS`.

    Returns:
        The tensors by name.

    Raises:
        ValueError: A damaged file, or one that does not hold what the configuration describes.
        FileNotFoundError: There are no weights, or not on this machine, with `local_files_only` or offline.
        OSError: The repo cannot be reached.
    """
    shapes = config.weight_shapes
    if os.path.isdir(source):
        files = _local_files(Path(source) / inside(hub.get("subfolder") or ""), shapes)
    else:
        files = _hub_files(_Repo.find(str(source), **hub), shapes, None if prefix == config.num_latents else prefix)
    found = {path: _local_spans(path) for path in files}
    rows = {span.name: _whole_shape(path, span, prefix, shapes) for path in files for span in found[path]}
    check_shapes(rows, shapes, str(files[0] if len(files) == 1 else files[0].parent))
    if len(rows) < sum(map(len, found.values())):
        raise SAEError(f"Several of the files {', '.join(map(str, files))} hold the same tensor; save the SAE again.")
    return dict(chain.from_iterable(_read_file(path, prefix).items() for path in files))


def _local_spans(path: Path) -> list[TensorSpan]:
    with open(path, "rb") as content:

        def read(start: int, stop: int) -> bytes:
            content.seek(start)
            return content.read(stop - start)

        return read_spans(read, path.stat().st_size, str(path))


def _whole_shape(
    path: Path, span: TensorSpan, prefix: int | None, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """The shape of a tensor in the whole checkpoint: a file of first rows has fewer."""
    whole = shapes.get(span.name, ())
    if prefix is None or not path.name.startswith(KEPT) or span.name not in PER_LATENT or not span.shape or not whole:
        return span.shape
    return (whole[0], *span.shape[1:]) if prefix <= span.shape[0] <= whole[0] else span.shape


def _first_rows(span: TensorSpan, prefix: int) -> TensorSpan:
    """The part of a tensor that the first `prefix` latents need."""
    if span.name not in PER_LATENT:
        return span
    stop = span.start + span.size // span.shape[0] * prefix
    return span._replace(shape=(prefix, *span.shape[1:]), stop=stop)


def _read_file(path: Path, prefix: int | None) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            if prefix is None:
                return {key: file.get_tensor(key) for key in keys}
            return {key: file.get_slice(key)[:prefix] if key in PER_LATENT else file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise damaged(str(path), str(error)) from error


def _shards(index: Path, where: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The files that an index names, each beside it. Raises `ValueError` for an index of anything but an SAE."""
    try:
        files = dict(read_json(index, where)["weight_map"])
        names = sorted({str(name) for name in files.values()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        problem = f"it cannot be read ({error})"
        raise SAEError(f"{where} is no index of safetensors files: {problem}. Save or upload it again.") from error
    astray = [name for name in names if not SHARD.fullmatch(name)]
    if astray:
        raise SAEError(
            f"{where} names other files than safetensors beside it ({shown(astray)[1:-1]}), so none of them is read."
        )
    check_shapes({name: shapes.get(name, ()) for name in files}, shapes, where)
    return names


def _local_files(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> list[Path]:
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    index = folder / INDEX_NAME
    if not index.is_file():
        raise SAENotFoundError(
            f"{folder} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}: there are no weights to read."
        )
    files = [folder / name for name in _shards(index, str(index), shapes)]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise SAENotFoundError(f"{index} names files that are not in the folder: {', '.join(absent)}.")
    return files


# The Hub


def pin_commit(source: str | os.PathLike, hub: Mapping[str, Any]) -> dict[str, Any]:
    """Name the commit of which the configuration was just read, so that the Hub is not asked again.

    The weights are then of the same commit. Arguments stay as they are where the configuration is not in the cache.

    Args:
        source: A folder, or a repo of the Hub.
        hub: Some of `HUB_ARGUMENTS`.

    Returns:
        The same, with the commit as revision.
    """
    if os.path.isdir(source):
        return dict(hub)
    name = str(PurePosixPath(hub.get("subfolder") or "") / "config.json")
    found = try_to_load_from_cache(str(source), name, cache_dir=hub.get("cache_dir"), revision=hub.get("revision"))
    if not isinstance(found, str):
        return dict(hub)
    return {**hub, "revision": Path(found).parents[len(PurePosixPath(name).parts) - 1].name}


@dataclass(frozen=True)
class _Repo:
    """A folder of a repo at one commit, and how to reach it."""

    id: str
    commit: str
    subfolder: str
    token: str | bool | None
    cache: Path
    offline: bool
    force: bool

    @classmethod
    def find(
        cls,
        repo_id: str,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "_Repo":
        """Settle the commit, by the configuration: it was read just before, and the weights must be of its commit."""
        subfolder = inside(subfolder or "")
        where = {"subfolder": subfolder, "revision": revision, "cache_dir": cache_dir}
        config = cached_file(repo_id, "config.json", token=token, local_files_only=local_files_only, **where)
        if config is None:
            raise SAENotFoundError(f"{repo_id} holds no {PurePosixPath(subfolder) / 'config.json'}.")
        commit = Path(config).parents[len(PurePosixPath(subfolder).parts)].name
        cache = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser()
        offline = local_files_only or is_offline_mode()
        return cls(repo_id, commit, subfolder, token, cache, offline, force_download)

    def path_of(self, name: str) -> str:
        """A file's path in the repo."""
        return str(PurePosixPath(self.subfolder) / name)

    def cached(self, name: str) -> Path | None:
        """A whole file in the Hub's own cache."""
        found = try_to_load_from_cache(self.id, self.path_of(name), cache_dir=self.cache, revision=self.commit)
        return Path(found) if isinstance(found, str) and not self.force else None

    def download(self, name: str) -> Path:
        """A whole file, by way of the Hub's own cache."""
        return Path(
            hf_hub_download(
                self.id,
                self.path_of(name),
                revision=self.commit,
                token=self.token,
                cache_dir=self.cache,
                local_files_only=self.offline,
                force_download=self.force,
            )
        )

    def url_of(self, name: str) -> str:
        return hf_hub_url(self.id, self.path_of(name), revision=self.commit)

    @property
    def prefixes(self) -> Path:
        return self.cache / "hf_msae--prefixes" / self.id.replace("/", "--")


def _hub_files(repo: _Repo, shapes: Mapping[str, tuple[int, ...]], prefix: int | None) -> list[Path]:
    """Files on this machine that together hold at least the first `prefix` rows, or all."""
    index = repo.cached(INDEX_NAME)
    if index is None:
        try:
            return [_hub_file(repo, WEIGHTS_NAME, shapes, prefix)]
        except EntryNotFoundError as error:
            absent = error
        try:
            index = repo.download(INDEX_NAME)
        except LocalEntryNotFoundError:
            raise absent from None
        except EntryNotFoundError:
            where = f"{repo.path_of(WEIGHTS_NAME)} nor {repo.path_of(INDEX_NAME)}"
            raise SAENotFoundError(f"{repo.id} holds neither {where} at {repo.commit}.") from None
    names = _shards(index, f"{repo.path_of(INDEX_NAME)} of {repo.id}", shapes)
    return [_hub_file(repo, name, shapes, prefix) for name in names]


def _hub_file(repo: _Repo, name: str, shapes: Mapping[str, tuple[int, ...]], prefix: int | None) -> Path:
    """A file on this machine with at least the first `prefix` rows of one in the repo.

    Raises `EntryNotFoundError` where the repo has no such file, or this machine none and may not ask.
    """
    whole = repo.cached(name)
    if whole is not None:
        return whole
    if prefix is None:
        return repo.download(name)
    note = repo.prefixes / "commits" / repo.commit / f"{repo.path_of(name)}.etag"
    if not repo.force and note.is_file():
        kept = _kept(repo.prefixes / note.read_text(encoding="utf-8"), prefix)
        if kept is not None:
            return kept
    if repo.offline:
        raise LocalEntryNotFoundError(
            f"The first {prefix:,} latents of {repo.path_of(name)} of {repo.id} ({repo.commit}) are not on this "
            "machine, and local_files_only or HF_HUB_OFFLINE forbids to ask the Hub. Load them once while online."
        )
    remote = RemoteFile.find(
        repo.url_of(name), build_hf_headers(token=repo.token), f"{repo.path_of(name)} of {repo.id}"
    )
    if remote is None:
        logger.warning("The server of %s sends whole files only: downloading %s.", repo.id, repo.path_of(name))
        return repo.download(name)
    kept = None if repo.force else _kept(repo.prefixes / remote.etag, prefix)
    path = kept or _fetch_prefix(repo, remote, name, shapes, prefix)
    if path.parent == repo.prefixes / remote.etag:
        # Half of a name finds no file, and the Hub is asked again: so it is written in place.
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(remote.etag, encoding="utf-8")
    return path


def _kept(folder: Path, prefix: int) -> Path | None:
    """The smallest file in a folder of prefixes that holds the one asked for."""
    sizes = [int(path.stem.removeprefix(KEPT)) for path in folder.glob(f"{KEPT}*.safetensors")]
    enough = [size for size in sizes if size >= prefix]
    return folder / f"{KEPT}{min(enough)}.safetensors" if enough else None


def _fetch_prefix(
    repo: _Repo, remote: RemoteFile, name: str, shapes: Mapping[str, tuple[int, ...]], prefix: int
) -> Path:
    """Download the first `prefix` rows to the cache, or the whole file where they are all of it."""
    spans = remote.read_spans()
    check_shapes({span.name: span.shape for span in spans}, shapes, remote.where, whole=False)
    wanted = [_first_rows(span, prefix) for span in spans]
    if wanted == spans:
        return repo.download(name)
    path = repo.prefixes / remote.etag / f"{KEPT}{prefix}.safetensors"
    remote.save(wanted, path)
    logger.warning(
        "Read %.1f MB of the %.1f MB of %s: the first %s of %s latents.",
        sum(span.size for span in wanted) / 1e6,
        remote.size / 1e6,
        remote.where,
        f"{prefix:,}",
        f"{shapes['W_enc'][0]:,}",
    )
    return path
