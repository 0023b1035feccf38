"""What every format shares: where a checkpoint's files are, and what is read from them.

A format's reader sees a `Files`, so that a folder and a repo of the Hub are one thing to it, and gives a `Foreign`:
the values of a configuration, tensors in our orientation, and what a user should know about the conversion.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from torch import Tensor


class FormatError(ValueError):
    """A checkpoint of another library that cannot be read, or not without more being said."""


@dataclass(frozen=True)
class Files:
    """The files of one checkpoint: a folder, or a folder of a Hub repo whose files are fetched when they are asked for.

    `source` is a local folder or a repo id.
    """

    source: str | Path
    subfolder: str = ""
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    @property
    def is_local(self) -> bool:
        """Whether the source is a folder of this machine."""
        return Path(self.source).is_dir()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Paths of all files relative to the checkpoint's folder, those in folders below it included."""
        if self.is_local:
            root = Path(self.source) / self.subfolder
            return tuple(sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()))
        paths = HfApi(token=self.token).list_repo_files(str(self.source), revision=self.revision)
        root_parts = PurePosixPath(self.subfolder).parts
        inside = (PurePosixPath(path) for path in paths)
        return tuple(
            PurePosixPath(*path.parts[len(root_parts) :]).as_posix()
            for path in inside
            if path.parts[: len(root_parts)] == root_parts
        )

    def path(self, name: str) -> Path:
        """Where a file lies on this machine; downloaded if need be."""
        if self.is_local:
            return Path(self.source) / self.subfolder / name
        return Path(
            hf_hub_download(
                str(self.source),
                name,
                subfolder=self.subfolder or None,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
            )
        )

    def __str__(self) -> str:
        return "/".join(part for part in (str(self.source), self.subfolder) if part)


@dataclass
class Foreign:
    """A checkpoint of another library in our terms.

    `config` are arguments of `MatryoshkaSAEConfig`. `state` holds W_enc and W_dec (num_latents, hidden_size), b_enc
    (num_latents,), b_dec (hidden_size,), and `threshold` (num_latents,) where the format has one. `notes` are sentences
    for the user: what was folded, what was not recorded.
    """

    library: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def chosen_prefix_sizes(
    recorded: Sequence[int] | None, given: Sequence[int] | None, num_latents: int, files: Files
) -> list[int]:
    """The nesting of a checkpoint whose library trains Matryoshka SAEs: as recorded, else as given, never invented.

    Raises `FormatError` where neither says it, or where both do and differ.
    """
    if recorded is None and given is None:
        raise FormatError(
            f"{files} is a Matryoshka SAE of {num_latents} latents, but its files do not say at which sizes it is "
            "nested. Give prefix_sizes (--prefix-sizes), as its authors report them."
        )
    sizes = sorted({*map(int, recorded if recorded is not None else given or ()), num_latents})
    if recorded is not None and given is not None and sizes != sorted({*map(int, given), num_latents}):
        raise FormatError(f"{files} records the prefix sizes {sizes}, but {list(given)} were given; leave them out.")
    return sizes
