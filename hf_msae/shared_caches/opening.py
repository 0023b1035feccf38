"""An activation cache by its name: a folder of this machine, or a data set of the Hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi

from hf_msae.data import CachedActivations, CacheError, is_activation_cache
from hf_msae.data.cache_files import FORMAT, shard_name
from hf_msae.data.unfinished import INDEX, MAX_INDEX_BYTES, unfinished_folder
from hf_msae.hub.data_sets import KIND, data_file
from hf_msae.modeling.untrusted import read_json
from hf_msae.shared_caches.hub_files import open_hub_cache

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_activation_cache(
    source: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> CachedActivations:
    """Open an activation cache, to train on it.

    Of one on the Hub, shards are fetched while they are read, a few ahead, into the Hub's cache on this machine. It is
    read as it is now: what is pushed later is not seen.

    Args:
        source: a folder that `cache_activations` wrote, or a data set of the Hub, owner/name.
        revision: branch, tag or commit of a data set on the Hub.
        token: for the Hub.

    Returns:
        What [`SAETrainer`][hf_msae.training.SAETrainer] takes as `train_dataset`.

    Raises:
        CacheError: there is no complete cache, it is damaged, or the Hub cannot be reached or refuses.
    """
    folder = Path(source).expanduser()
    if not folder.exists() and not unfinished_folder(folder).exists():
        return CachedActivations(open_hub_cache(str(source), revision, token), batch_size=1)
    if revision is not None:
        raise CacheError(
            f"revision={revision!r} is for a cache on the Hub, but {folder} is here: leave it out, or rename what "
            "lies there to read the Hub's"
        )
    return CachedActivations(folder, batch_size=1)


def is_cache_source(source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> bool:
    """Whether a folder, or a data set of the Hub, holds an activation cache, damaged or not.

    Args:
        source: which.
        revision: branch, tag or commit of a data set on the Hub.
        token: for the Hub.
    """
    if Path(source).exists():
        return is_activation_cache(source)
    name = str(source)
    if not REPO_ID.fullmatch(name):
        return False
    index = data_file(name, INDEX, revision=revision, token=token)
    if index is None:
        return False
    try:
        return read_json(index, max_bytes=MAX_INDEX_BYTES).get("format") == FORMAT
    except ValueError:
        # What lies beside it tells what it was.
        return HfApi(token=token).file_exists(name, shard_name(0), repo_type=KIND, revision=revision)
