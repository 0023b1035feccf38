"""The files of an activation cache on the Hub, fetched while they are read.

A run begins with the first shard, and while one is trained on the next come in the background: as many as AHEAD, each
in a thread of its own, so that a run which ends waits for none. They lie in the Hub's own cache on this machine, which
all processes of a machine share and which keeps them for the next pass and the next run.

A cache is read at one commit from its beginning to its end. So a push in the meantime changes nothing, and a shard of
another cache cannot come among them: what the index says that shards hold is compared with what the Hub has before any
is fetched.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from hf_msae.data.cache_files import (
    KIND,
    CacheError,
    CacheFiles,
    CacheFolder,
    check_shard,
    fingerprint_of_index,
    read_index_file,
)
from hf_msae.data.fingerprints import of_digests
from hf_msae.data.unfinished import INDEX
from hf_msae.hub.data_sets import KIND as DATA_SET
from hf_msae.hub.retrying import read_with_retries

# Shards fetched before they are read. One would do where the network is as fast as training on average.
AHEAD = 2


def open_hub_cache(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> CacheFiles:
    """The files of a cache on the Hub as it is now; of one that was fetched whole, also where there is no network.

    Args:
        repo_id: The data set.
        revision: Branch, tag or commit.
        token: For the Hub.

    Raises:
        CacheError: There is no such data set, this token may not read it, or it holds no whole cache.
    """
    try:
        return HubCache(repo_id, revision, token)
    except _Unreachable as error:
        fetched = _fetched_before(repo_id, revision)
        if fetched is None:
            raise CacheError(str(error)) from error
        return fetched


class _Unreachable(CacheError):
    """No answer from the Hub."""


def _fetched_before(repo_id: str, revision: str | None) -> CacheFolder | None:
    try:
        folder = snapshot_download(repo_id, repo_type=DATA_SET, revision=revision, local_files_only=True)
        files = CacheFolder(Path(folder), _description(repo_id, Path(folder).name))
        files.read_index()
    except (OSError, ValueError):  # nothing, or not all of it: what tells is why the Hub could not be asked
        return None
    return files


class HubCache(CacheFiles):
    """A cache in a data set of the Hub, at one commit.

    Args:
        repo_id: The data set.
        revision: Branch, tag or commit.
        token: For the Hub.

    Raises:
        CacheError: As `open_hub_cache` does.
    """

    def __init__(self, repo_id: str, revision: str | None = None, token: str | bool | None = None) -> None:
        self.repo_id, self._token = repo_id, token
        self._api = HfApi(token=token, library_name="hf_msae")
        try:
            # By the branch's name, so that the Hub's cache knows where it was when there is no network.
            path = Path(self._api.hf_hub_download(repo_id, INDEX, repo_type=DATA_SET, revision=revision))
            commit = path.parent.name
            info = self._api.dataset_info(repo_id, revision=commit, files_metadata=True)
        except (HTTPError, OSError, HFValidationError) as error:
            raise _in_words(repo_id, revision, error, self._api.endpoint) from error
        self.commit, self.directory = commit, path.parent
        self.description = _description(repo_id, commit)
        self._digests = {file.rfilename: _digest(file) for file in info.siblings or ()}
        self._index = read_index_file(path, repo_id)
        self._shards: dict[str, Mapping[str, Any]] = {shard["file"]: shard for shard in self._index["shards"]}
        self._coming: dict[str, Future[Path]] = {}
        self._check_shards()

    def read_index(self) -> dict[str, Any]:
        """The index, as it is at the commit."""
        return self._index

    def shard(self, name: str) -> Path:
        """A shard, waited for where it is on its way."""
        coming = self._coming.pop(name, None)
        path = self._fetch(name) if coming is None else coming.result()
        check_shard(path, self._shards[name]["num_tokens"], self._index["hidden_sizes"])
        return path

    def expect(self, names: Sequence[str]) -> None:
        """Begin to fetch the next ones."""
        for name in names[:AHEAD]:
            if name not in self._coming:
                future: Future[Path] = Future()
                self._coming[name] = future
                threading.Thread(target=self._keep_promise, args=(name, future), daemon=True).start()

    def at_commit(self, commit: str | None) -> "HubCache":
        """The cache in another state of its repo."""
        return self if commit == self.commit else HubCache(self.repo_id, commit, self._token)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this cache from others: that of the folder which was pushed, where its index records shards."""
        recorded = fingerprint_of_index(self._index)
        return recorded or {"kind": KIND, **of_digests([self._digests[name] for name in self._shards])}

    def _check_shards(self) -> None:
        missing = [name for name in self._shards if name not in self._digests]
        if missing:
            raise CacheError(
                f"{self.description}, lacks {len(missing):,} of its {len(self._shards):,} shards, the first of them "
                f"{missing[0]}; push the cache again, whole"
            )
        for name, shard in self._shards.items():
            if shard.get("sha256", self._digests[name]) != self._digests[name]:
                raise CacheError(
                    f"{self.description}, has another {name} than its index says; push the cache again, whole"
                )

    def _keep_promise(self, name: str, future: "Future[Path]") -> None:
        try:
            future.set_result(self._fetch(name, _NoBar))
        except BaseException as error:  # for whoever waits, who is in another thread
            future.set_exception(error)

    def _fetch(self, name: str, bar: type[tqdm] = tqdm) -> Path:
        def attempt() -> str:
            return self._api.hf_hub_download(
                self.repo_id, name, repo_type=DATA_SET, revision=self.commit, tqdm_class=bar
            )

        try:
            return Path(read_with_retries(self.repo_id, attempt))
        except (HTTPError, OSError) as error:
            raise CacheError(f"{name} of {self.description}, cannot be fetched: {_last_line(error)}") from error


class _NoBar(tqdm):
    """Of what is fetched in the background."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})


def _digest(file: Any) -> str:
    """What the Hub knows a file's contents by: the SHA-256 of a large one, as shards are."""
    return str(file.lfs.sha256 if file.lfs is not None else file.blob_id)


def _description(repo_id: str, commit: str) -> str:
    """Begins with the repo, as that of any data set on the Hub does: cards find it there."""
    return f"{repo_id} at {commit}, an activation cache on the Hub"


def _in_words(repo_id: str, revision: str | None, error: Exception, endpoint: str) -> CacheError:
    place = f"{endpoint}/datasets/{repo_id}"
    if isinstance(error, GatedRepoError):
        return CacheError(
            f"The data set {repo_id} is gated: ask for access at {place}, and log in (`hf auth login`) as who has it."
        )
    if isinstance(error, RevisionNotFoundError):
        return CacheError(f"The data set {repo_id} has no revision {revision!r}.")
    if isinstance(error, RepositoryNotFoundError):
        return CacheError(
            f"There is no data set {repo_id} on the Hub that this token sees; check the spelling, or log in (`hf auth "
            "login`) where it is private."
        )
    if isinstance(error, HFValidationError):
        return CacheError(f"{repo_id!r} is neither a folder nor the id of a data set on the Hub (owner/name).")
    if isinstance(error, EntryNotFoundError) and isinstance(error, HfHubHTTPError):
        return CacheError(
            f"The data set {repo_id} holds no activation cache, or not all of one: it has no {INDEX}. "
            "`hf-msae push FOLDER REPO` publishes a whole cache."
        )
    kind = CacheError if isinstance(error, HfHubHTTPError) else _Unreachable
    return kind(f"The data set {repo_id} cannot be read from {endpoint}: {_last_line(error)}")


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
