"""What a Hub keeps: repos whose commits never change, accounts, and large files beside them.

A commit is a dict from path to file that nothing alters afterwards, so every revision that a client pinned stays
readable, as in git. Errors carry the status and the code that decide which exception the client raises.
"""

import fnmatch
import hashlib
import itertools
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

# What the Hub's first .gitattributes says, shortened: these go to the large-file storage whatever their size.
LARGE_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.npz", "*.arrow", "*.parquet", "*.png", "*.gz")
LARGE_SIZE = 10_000_000

# Makes commits of equal content differ, so that nothing cached by commit in one test is found by another.
_commit_numbers = itertools.count()


class HubError(Exception):
    """An answer other than success: HTTP status, `X-Error-Code` and message."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None, **body: object):
        super().__init__(message)
        self.status, self.message, self.code, self.commit, self.body = status, message, code, commit, body


@dataclass(frozen=True)
class Account:
    """Who a token belongs to; `role` is `write` or `read`."""

    name: str
    role: str = "write"


@dataclass(frozen=True)
class File:
    content: bytes
    large: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git itself stores of a large file."""
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        stored = self.pointer if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob_id

    def describe(self, path: str) -> dict:
        """An entry of the tree listing."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id}
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    sha: str
    files: Mapping[str, File]
    title: str
    description: str
    author: str
    parent: str | None


def is_large(path: str, size: int) -> bool:
    name = path.rsplit("/", 1)[-1]
    return size > LARGE_SIZE or (size > 0 and any(fnmatch.fnmatch(name, pattern) for pattern in LARGE_PATTERNS))


def front_matter(text: str) -> dict | None:
    """The YAML block that opens a card; None without one. Raises `yaml.YAMLError`."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    return None if match is None else yaml.safe_load(match.group(1))


def tags_of(card: Mapping[str, Any]) -> list[str]:
    """The tags by which the Hub filters: those of the card, and what follows from its other keys."""
    models = card.get("base_model") or []
    models = [models] if isinstance(models, str) else models
    named = [card[key] for key in ("library_name", "pipeline_tag") if key in card]
    relation = card.get("base_model_relation")
    related = [f"base_model:{relation}:{model}" for model in models if relation]
    own = list(card.get("tags") or [])
    return list(dict.fromkeys([*named, *own, *(f"base_model:{model}" for model in models), *related]))


@dataclass
class Repo:
    """One repo of `kind` `model`, `dataset` or `space`; `gated` lets only `approved` accounts download."""

    id: str
    kind: str
    private: bool = False
    sdk: str | None = None
    gated: bool = False
    approved: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    # One commit after the other, as on the Hub: between a look at the parent and the new ref nobody else's may come.
    committing: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_PATTERNS)
        files = {".gitattributes": File(attributes.encode(), large=False)}
        self.refs["refs/heads/main"] = self._store(files, None, "initial commit", "", self.owner).sha

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def _store(self, files: Mapping[str, File], parent: str | None, title: str, description: str, author: str):
        identity = f"{next(_commit_numbers)} {self.kind} {self.id} {sorted((p, f.blob_id) for p, f in files.items())}"
        sha = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[sha] = Commit(sha, dict(files), title, description, author, parent)
        return self.commits[sha]

    def ref_of(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def at(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request, or (shortened) sha."""
        ref = self.ref_of(revision)
        if ref is not None:
            return self.commits[self.refs[ref]]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            for sha, commit in self.commits.items():
                if sha.startswith(revision):
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def file(self, revision: str, path: str) -> tuple[Commit, File]:
        commit = self.at(revision)
        if path not in commit.files:
            raise HubError(404, f"{path} does not exist on '{revision}'", "EntryNotFound", commit.sha)
        return commit, commit.files[path]

    def history(self, revision: str) -> list[Commit]:
        """Commits, the newest first."""
        commits = [self.at(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def commit(
        self,
        revision: str,
        added: Mapping[str, File],
        deleted: list[str],
        title: str,
        description: str = "",
        author: str = "",
        parent: str | None = None,
        pull_request: bool = False,
    ) -> tuple[Commit, str]:
        """A commit on a branch or pull request, or on a new pull request; gives it and the name of its ref.

        `deleted` names files, and folders by a closing slash.
        """
        with self.committing:
            return self._commit(revision, added, deleted, title, description, author, parent, pull_request)

    def _commit(
        self,
        revision: str,
        added: Mapping[str, File],
        deleted: list[str],
        title: str,
        description: str,
        author: str,
        parent: str | None,
        pull_request: bool,
    ) -> tuple[Commit, str]:
        base = self.at(revision)
        ref = self.ref_of(revision)
        if ref is None or ref.startswith("refs/tags/"):
            raise HubError(404, f"Not a branch: {revision}", "RevisionNotFound")
        if parent is not None and not base.sha.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for path in deleted:
            gone = [name for name in files if name == path or (path.endswith("/") and name.startswith(path))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        new = self._store({**files, **added}, base.sha, title, description, author or self.owner)
        if pull_request:
            ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in self.refs)}"
        self.refs[ref] = new.sha
        return new, ref

    def tree(self, revision: str, folder: str, recursive: bool) -> list[dict]:
        """Files and folders under `folder` ("" for the root)."""
        commit = self.at(revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in commit.files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on '{revision}'", "EntryNotFound", commit.sha)
        folders = {
            path[: end.start()] for path in inside for end in re.finditer("/", path) if end.start() >= len(prefix)
        }
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": name, "size": 0, "oid": name} for name in folders
        ]
        entries += [file.describe(path) for path, file in inside.items()]
        shown = [entry for entry in entries if recursive or "/" not in entry["path"][len(prefix) :]]
        return sorted(shown, key=lambda entry: entry["path"])

    def describe(self, revision: str, blobs: bool) -> dict:
        """What `model_info` and its like show; the metadata of the card as in README.md."""
        commit = self.at(revision)
        card = commit.files.get("README.md")
        data = None if card is None else front_matter(card.content.decode())
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if blobs:
            for sibling in siblings:
                entry = commit.files[sibling["rfilename"]].describe(sibling["rfilename"])
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    sibling["lfs"] = {**entry["lfs"], "sha256": entry["lfs"]["oid"]}
        dates = {"lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z"}
        about = {"id": self.id, "modelId": self.id, "author": self.owner, "sha": commit.sha, "private": self.private}
        about |= {"gated": "manual" if self.gated else False, "disabled": False, "downloads": 0, "likes": 0}
        about |= {"tags": tags_of(data or {}), "cardData": data or {}, "siblings": siblings, **dates}
        for key in ("library_name", "pipeline_tag"):
            if data and key in data:
                about[key] = data[key]
        return about | ({"sdk": self.sdk} if self.kind == "space" else {})
