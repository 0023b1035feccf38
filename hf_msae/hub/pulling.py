"""Fetching SAEs from the Hub into a folder from which they load like any other."""

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from hf_msae.atomic_files import atomic_folder
from hf_msae.hub.card import write_model_card
from hf_msae.hub.index import (
    CONFIG_NAME,
    INDEX_NAME,
    NoSAEError,
    SAEEntry,
    choose,
    find_entries,
    format_index,
    list_saes,
)
from hf_msae.hub.results import CARD_NAME, CODE_NAMES, GENERATED, read_result, save_quietly
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.modeling.prefix_loading import WEIGHTS_NAME
from hf_msae.modeling.untrusted import inside, shown

logger = logging.getLogger(__name__)

FILES_OF_AN_SAE = {
    *(CONFIG_NAME, WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json", CARD_NAME, *GENERATED, *CODE_NAMES),
    *("steering.json", "evaluation.json", "meta_sae.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "CITATION.cff"),
}
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def cache_folder() -> Path:
    """Where this user's caches of hf_msae lie: what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf-msae"


@dataclass(frozen=True)
class Pulled:
    """One SAE that was fetched.

    Args:
        entry: What it is.
        folder: Where it lies.
        num_latents: How many of its latents were fetched.
        num_bytes: Size of its weights here.
        num_bytes_on_hub: Size of its weights on the Hub.
    """

    entry: SAEEntry
    folder: Path
    num_latents: int
    num_bytes: int
    num_bytes_on_hub: int


def pull(
    repo_id: str,
    folder: str | Path,
    *,
    subfolder: str | None = None,
    sites: Sequence[str] | None = None,
    prefix: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> list[Pulled]:
    """Fetch a repo's SAEs, or some of them, into a new folder, which appears when everything is there.

    An SAE chosen by `subfolder` becomes the folder itself; otherwise each keeps its folder. Only what belongs to an
    SAE is copied: people start Python in such a folder, and any file of code in it would be imported in place of the
    module of its name. What was left out is logged.

    Args:
        repo_id: The repo.
        folder: Where to put them; absent or empty.
        subfolder: Only the SAE in this folder of the repo.
        sites: Only the SAEs at these sites, as for `load_saes`.
        prefix: Only the first latents of each, with a card for what then is a smaller SAE.
        revision: Branch, tag or commit.
        token: A token that may read; the one that is logged in by default.

    Returns:
        What was fetched.

    Raises:
        NoSAEError: A repo, revision, subfolder or site that is not there, or a prefix that is none of one of them.
        OutputExistsError: The folder exists and is not empty.
    """
    target = Path(folder)
    hub: dict[str, Any] = {"revision": revision, "token": token}
    entries = _chosen(repo_id, subfolder, sites, hub)
    too_small = [entry for entry in entries if prefix is not None and not 1 <= prefix <= entry.num_latents]
    if too_small:
        raise NoSAEError(
            f"prefix must be from 1 to {too_small[0].num_latents}, the latents of the SAE in "
            f"{too_small[0].subfolder or 'the root'} of {repo_id}; got {prefix}."
        )
    # An SAE asked for by its folder becomes the folder itself.
    places = {entry.subfolder: "" if subfolder is not None else entry.subfolder for entry in entries}
    with atomic_folder(target) as draft:
        if prefix is None:
            _fetch_files(repo_id, places, draft, hub)
        else:
            for entry in entries:
                place = places[entry.subfolder]
                _fetch_prefix(repo_id, entry.subfolder, prefix, draft / place, target / place, hub)
        if any(places.values()):
            (draft / INDEX_NAME).write_text(format_index(find_entries(draft)), encoding="utf-8")
    return [_pulled(repo_id, entry, target / places[entry.subfolder], prefix, hub) for entry in entries]


def _chosen(repo_id: str, subfolder: str | None, sites: Sequence[str] | None, hub: dict[str, Any]) -> list[SAEEntry]:
    entries = list_saes(repo_id, **hub)
    if subfolder is not None:
        there = ", ".join(entry.subfolder or "the root" for entry in entries)
        entries = [entry for entry in entries if entry.subfolder == inside(subfolder)]
        if not entries:
            raise NoSAEError(f"{repo_id} has no SAE in {subfolder!r}; there are: {there}.")
    return choose(entries, sites)


def _fetch_files(repo_id: str, places: Mapping[str, str], draft: Path, hub: Mapping[str, Any]) -> None:
    """Fetch all files of some SAEs, and the root's where all keep their folders.

    `places` gives the folders here by those in the repo.
    """
    revision = HfApi(token=hub["token"]).model_info(repo_id, revision=hub["revision"]).sha
    names = HfApi(token=hub["token"]).list_repo_files(repo_id, revision=revision)
    folders = {*places} | ({""} if all(place == sub for sub, place in places.items()) else set())
    there = [name for name in names if _folder_of(name) in folders and name not in (".gitattributes", INDEX_NAME)]
    wanted = [name for name in there if _belongs(PurePosixPath(name).name)]
    if len(wanted) < len(there):
        strange = sorted(map(repr, set(there) - set(wanted)))
        logger.warning("Not fetched from %s, since it is no part of an SAE: %s", repo_id, shown(strange)[1:-1])
    snapshot = Path(snapshot_download(repo_id, revision=revision, token=hub["token"], allow_patterns=wanted))
    for name in wanted:
        here = draft / places.get(_folder_of(name), "") / PurePosixPath(name).name
        here.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(snapshot / name, here)


def _belongs(name: str) -> bool:
    """Whether a file of that name is a part of an SAE, or says something of it, and is nothing that runs by itself."""
    return name in FILES_OF_AN_SAE or _is_weights(name)


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def _fetch_prefix(
    repo_id: str, subfolder: str, prefix: int, draft: Path, target: Path, hub: Mapping[str, Any]
) -> None:
    """The first latents of an SAE, saved as an SAE of its own with its card."""
    sae = MatryoshkaSAE.from_pretrained(repo_id, subfolder=subfolder, prefix=prefix, **hub)
    save_quietly(sae, draft)
    result = read_result(draft)
    write_model_card(
        draft / CARD_NAME,
        sae.config,
        result.measurement,
        {},
        {},
        source=str(target),
        latent=result.latent,
        prefix_of=f"{repo_id}/{subfolder}".rstrip("/"),
    )


def _pulled(repo_id: str, entry: SAEEntry, folder: Path, prefix: int | None, hub: Mapping[str, Any]) -> Pulled:
    """What was fetched. The weights are one file or several, in the repo as here."""
    info = HfApi(token=hub["token"]).model_info(repo_id, revision=hub["revision"], files_metadata=True)
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    on_hub = sum(
        size
        for name, size in files.items()
        if _folder_of(name) == entry.subfolder and _is_weights(PurePosixPath(name).name)
    )
    here = sum(path.stat().st_size for path in folder.iterdir() if _is_weights(path.name))
    return Pulled(entry, folder, prefix or entry.num_latents, here, on_hub)


def _is_weights(name: str) -> bool:
    return name == WEIGHTS_NAME or SHARD.fullmatch(name) is not None
