"""Links in folders that are published.

A folder that somebody else made, cloned or unpacked, may hold a link to any file of this machine under the name of a
card or of a file of code, and a push would publish that file.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from hf_msae.errors import InputError


def refuse_links_out(root: Path, paths: Iterable[Path]) -> None:
    """Refuse to publish what does not lie in a folder.

    Args:
        root: The folder that a user named.
        paths: Files in it that would be published as they are. Links of the Hub's own cache are no matter: they lead
            to the files of the same repo.

    Raises:
        InputError: For a link that leads out of the folder, saying where.
    """
    home = Path(os.path.realpath(root))
    for path in paths:
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(home) and not _is_cached(home, target):
            raise InputError(
                f"{path} is a link to {target}, outside of {root}, so it is not published. Put the file itself there "
                "if it is meant, or take the link away."
            )


def _is_cached(home: Path, target: Path) -> bool:
    """Whether a file is one of the blobs of the repo in the Hub's cache of which `home` is a snapshot."""
    snapshots = next((folder for folder in home.parents if folder.name == "snapshots"), None)
    return snapshots is not None and target.parent == snapshots.parent / "blobs"
