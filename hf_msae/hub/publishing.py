"""Pushing: one SAE or a run's folder goes to the Hub with its code, its numbers, a card and the index, in one commit.

A commit is whole or absent, so a push that fails leaves the repo as it was. Card and index depend on what the repo
holds; the commit therefore names the commit that they were made for as its parent, and is made again where somebody
else's came first.
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from hf_msae.hub.card import CardFacts, render_collection_card, render_collection_part, render_model_card
from hf_msae.hub.card_parts import has_marks, merge_cards
from hf_msae.hub.curves import NAME as CURVES_NAME
from hf_msae.hub.index import (
    CONFIG_NAME,
    INDEX_NAME,
    SAEEntry,
    find_entries,
    format_index,
    make_entry,
    model_type,
)
from hf_msae.hub.links import refuse_links_out
from hf_msae.hub.results import CARD_NAME, GENERATED, METRICS_NAME, Result, grid_folders, read_result, save_quietly
from hf_msae.hub.retrying import PublishError, check_may_write, with_retries, writing_api
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.modeling.untrusted import inside

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushTarget:
    """Where a push goes."""

    api: HfApi
    repo_id: str
    revision: str | None
    create_pr: bool


def push(
    sae: MatryoshkaSAE,
    repo_id: str,
    *,
    subfolder: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Publish an SAE, as `MatryoshkaSAE.push_to_hub` documents.

    Where the SAE was loaded from the folder of a training run, the run's numbers come along.

    Args:
        sae: The SAE.
        repo_id: The repo, owner/name or a name of one's own; made where it is not there.
        subfolder: Folder of the SAE in the repo; the root by default.
        private: Whether a repo that is made is private. A public one that is there is refused with True.
        revision: Branch; made where it is not there.
        create_pr: Whether to open a pull request instead of committing to the branch.
        commit_message: Message of the commit.
        token: A token that may write; the one that is logged in by default.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        PublishError: No token or none that may write, a bad id, a repo that is public although `private` was asked for
            or that holds something else, a Hub that cannot be reached.
    """
    api = _checked_api(repo_id, token)
    with tempfile.TemporaryDirectory() as draft:
        save_quietly(sae, Path(draft))
        origin = Path(sae.config.name_or_path) if sae.config.name_or_path else None
        result = read_result(Path(draft), beside=origin if origin is not None and origin.is_dir() else None)
        if result.config.converted_from and origin is not None and not origin.exists():
            result = replace(result, origin=str(origin))
        results = {_checked_subfolder(subfolder): result}
        return _push(api, repo_id, results, {}, private, revision, create_pr, commit_message)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    subfolder: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Publish what a training run or `save_pretrained` left in a folder.

    That is one SAE, or a grid with a folder for each, whose names become subfolders of the repo. Checkpoints and
    trackers stay at home, and so does what a link leads to outside of the folder.

    Args:
        folder: The folder.
        repo_id: As for `push`, and so are the others.
        subfolder: Folder in the repo, below which all is put.
        private: As for `push`.
        revision: As for `push`.
        create_pr: As for `push`.
        commit_message: As for `push`.
        token: As for `push`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        PublishError: As for `push`.
        NoSAEError: The folder holds no SAE, or a damaged one.
        InputError: A file would be published that is a link out of the folder.
    """
    api = _checked_api(repo_id, token)
    folder, at = Path(folder), _checked_subfolder(subfolder)
    if not folder.is_dir():
        raise PublishError(f"There is no folder {folder} to push.")
    results = {name: read_result(path, root=folder) for name, path in grid_folders(folder).items()}
    found = {"/".join(filter(None, (at, name))): result for name, result in results.items()}
    shared = {}
    if found.keys() != {at} and (folder / METRICS_NAME).is_file():
        refuse_links_out(folder, [folder / METRICS_NAME])
        shared["/".join(filter(None, (at, METRICS_NAME)))] = folder / METRICS_NAME
    return _push(api, repo_id, found, shared, private, revision, create_pr, commit_message)


def prepare_repo(repo_id: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """Make the repo to which a later push will go, if it is not there.

    Args:
        repo_id: The repo, owner/name or a name of one's own.
        private: As for `push`.
        token: As for `push`.

    Returns:
        Its whole id, owner/name.

    Raises:
        PublishError: That push could not work, so that it is known before long work: no token, or one that may not
            write there, a bad id, a public repo where `private` was asked for, a Hub that cannot be reached.
    """
    api = _checked_api(repo_id, token)

    def attempt() -> str:
        target = _prepare(api, repo_id, private, None, create_pr=False)
        check_may_write(api, target.repo_id)
        return target.repo_id

    return with_retries(api, repo_id, None, attempt)


# Checks


def _checked_api(repo_id: str, token: str | bool | None) -> HfApi:
    """Refuses what cannot work before anything is read or sent."""
    if repo_id.startswith(("datasets/", "spaces/", "http://", "https://")):
        raise PublishError(f"SAEs go to model repos; give owner/name rather than {repo_id!r}.")
    return writing_api(token)


def _checked_subfolder(subfolder: str | None) -> str:
    try:
        cleaned = inside(subfolder or "")
    except ValueError as error:
        raise PublishError(str(error)) from error
    if any(part[0] in ".-" for part in cleaned.split("/") if part):
        raise PublishError(f"The subfolder {subfolder!r} must be a path below the repo's root, such as layers.12/16k.")
    return cleaned


# The push


def _push(
    api: HfApi,
    repo_id: str,
    results: Mapping[str, Result],
    shared: Mapping[str, Path],
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
) -> str:
    """Push the SAEs of some subfolders (`results`) and other files by their paths in the repo.

    What passes by itself is tried again.
    """
    message = commit_message or f"Upload {'a Matryoshka SAE' if len(results) == 1 else f'{len(results)} SAEs'}"
    weights = _additions(results, shared)

    def attempt() -> str:
        target = _prepare(api, repo_id, private, revision, create_pr)
        return _commit(target, results, weights, message)

    return with_retries(api, repo_id, revision, attempt)


def _prepare(api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool) -> PushTarget:
    """The repo, made if it is not there, and the branch."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise PublishError(
            f"{repo_id} exists and is public, but private was asked for. Make it private in its settings on the Hub, "
            "or push to another repo."
        )
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return PushTarget(api, repo_id, revision, create_pr)


def _commit(
    target: PushTarget, results: Mapping[str, Result], weights: Sequence[CommitOperationAdd], message: str
) -> str:
    """One commit on the repo as it is now."""
    api, repo_id = target.api, target.repo_id
    info = api.model_info(repo_id, revision=target.revision)
    there = {file.rfilename for file in info.siblings or ()}
    before = find_entries(repo_id, revision=info.sha, token=api.token) if _has_saes(there) else []
    before = [entry for entry in before if _path(entry.subfolder, CONFIG_NAME) in there]
    _refuse_mixture(target, results, before, there, info.sha)
    entries = [entry for entry in before if entry.subfolder not in results]
    entries += [make_entry(subfolder, result.config) for subfolder, result in results.items()]
    texts = {
        path: _merged(target, path, text, local, there, info.sha)
        for path, (text, local) in _cards(target.repo_id, results, entries).items()
    }
    if any(entry.subfolder for entry in entries):
        texts[INDEX_NAME] = format_index(entries)
    generated = [CommitOperationAdd(path, text.encode()) for path, text in texts.items() if text is not None]
    written = {operation.path_in_repo for operation in weights}
    stale = sorted({_path(sub, name) for sub in results for name in GENERATED} & there - written)
    commit = api.create_commit(
        repo_id,
        [*weights, *generated, *map(CommitOperationDelete, stale)],
        commit_message=message,
        revision=target.revision,
        create_pr=target.create_pr,
        parent_commit=info.sha,
    )
    return commit.pr_url or commit.commit_url


def _has_saes(there: set[str]) -> bool:
    return any(path.split("/")[-1] in (CONFIG_NAME, INDEX_NAME) for path in there)


def _path(subfolder: str, name: str) -> str:
    return f"{subfolder}/{name}" if subfolder else name


def _refuse_mixture(
    target: PushTarget, results: Mapping[str, Result], before: Sequence[SAEEntry], there: set[str], sha: str | None
) -> None:
    """Raises `PublishError` where a push would overwrite another kind of model, or mix up a collection's root."""
    known = {entry.subfolder for entry in before}
    for subfolder in results.keys() - known:
        path = _path(subfolder, CONFIG_NAME)
        if path in there:
            found = model_type(Path(target.api.hf_hub_download(target.repo_id, path, revision=sha)))
            if found != MatryoshkaSAEConfig.model_type:
                raise PublishError(
                    f"{path} in {target.repo_id} is that of another model (model_type {found!r}), which the push "
                    "would overwrite. Give another repo, or a subfolder."
                )
    if "" in results and known - {""} and "" not in known:
        raise PublishError(
            f"{target.repo_id} holds SAEs in folders ({', '.join(sorted(known))}); give a subfolder for this one, too."
        )


def _additions(results: Mapping[str, Result], shared: Mapping[str, Path]) -> list[CommitOperationAdd]:
    """List the files that do not depend on what the repo holds.

    They are kept over all attempts, so that what was uploaded once is not uploaded again.
    """
    files: dict[str, Path | bytes] = dict(shared)
    for subfolder, result in results.items():
        files |= {_path(subfolder, name): content for name, content in result.files.items()}
        # transformers looks for code only at the root of a repo, and a downloaded folder has to load by itself.
        files |= {name: content for name, content in result.files.items() if name.endswith(".py")}
    return [CommitOperationAdd(path, content) for path, content in files.items()]


# Cards


def _cards(
    repo_id: str, results: Mapping[str, Result], entries: Sequence[SAEEntry]
) -> dict[str, tuple[str, str | None]]:
    """Fresh cards by their paths, each with the one that lies beside the SAE on this machine."""
    in_folders = sorted((entry for entry in entries if entry.subfolder), key=lambda entry: entry.subfolder)
    cards: dict[str, tuple[str, str | None]] = {}
    for subfolder, result in results.items():
        facts = CardFacts(
            result.config,
            repo_id,
            subfolder,
            result.measurement,
            result.training,
            result.arguments,
            result.versions,
            result.latent,
            CURVES_NAME in result.files,
            result.origin,
            () if subfolder else in_folders,
        )
        cards[_path(subfolder, CARD_NAME)] = (render_model_card(facts), result.card)
    if CARD_NAME not in cards:
        has_root = any(not entry.subfolder for entry in entries)
        render = render_collection_part if has_root else render_collection_card
        cards[CARD_NAME] = (render(in_folders, repo_id), None)
    return cards


def _merged(
    target: PushTarget, path: str, fresh: str, local: str | None, there: set[str], sha: str | None
) -> str | None:
    """Merge a card with what people wrote into the one on the Hub, or else into the one on this machine.

    None where the one on the Hub needs no change.
    """
    if path not in there:
        return fresh if local is None else merge_cards(local, fresh)
    existing = Path(target.api.hf_hub_download(target.repo_id, path, revision=sha)).read_bytes().decode()
    merged = merge_cards(existing, fresh)
    if merged != existing:
        return merged
    if not has_marks(existing):
        logger.warning("%s of %s was written by somebody and has no marks of ours, so it stays.", path, target.repo_id)
    return None
