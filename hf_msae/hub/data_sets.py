"""Data sets on the Hub: shards with an index and a card, pushed in one commit and fetched again.

For what this package writes as a folder of data: latents of some text, and activations to train on.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, RepositoryNotFoundError

from hf_msae.errors import InputError
from hf_msae.hub.card import dataset_name, public_name
from hf_msae.hub.card_parts import merge_cards
from hf_msae.hub.links import refuse_links_out
from hf_msae.hub.results import CARD_NAME
from hf_msae.hub.retrying import PublishError, check_may_write, with_retries, writing_api

KIND = "dataset"


def prepare_data_repo(repo_id: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """Make the data set's repo to which a later push will go, if it is not there.

    Args:
        repo_id: The repo, owner/name or a name of one's own.
        private: Whether a repo that is made is private. A public one that is there is refused with True.
        token: A token that may write; the one that is logged in by default.

    Returns:
        Its whole id, owner/name.

    Raises:
        PublishError: That push could not work, so that it is known before long work.
    """
    api = _checked_api(repo_id, token)

    def attempt() -> str:
        made = _prepare(api, repo_id, private)
        check_may_write(api, made)
        return made

    return with_retries(api, repo_id, None, attempt)


def push_data(
    folder: Path,
    names: Sequence[str],
    card: str,
    repo_id: str,
    *,
    stale: str,
    written: Mapping[str, str] | None = None,
    private: bool | None = None,
    commit_message: str = "Upload data",
    token: str | bool | None = None,
) -> str:
    """Publish files of a folder as a data set, in one commit.

    Args:
        folder: With the files.
        names: Of the files, all of them in the folder itself.
        card: For the repo; what people wrote into the one that is there is kept.
        repo_id: As for `prepare_data_repo`, and so is `private`.
        stale: A pattern of names; what the repo has of these, and is not pushed, is deleted.
        written: What some of the files hold on the Hub, instead of what they hold in the folder.
        private: See `repo_id`.
        commit_message: The title of the commit.
        token: A token that may write; the one that is logged in by default.

    Returns:
        The address of the commit.

    Raises:
        PublishError: No token or none that may write, a bad id, a Hub that cannot be reached.
        InputError: A file is a link out of the folder.
    """
    api = _checked_api(repo_id, token)
    refuse_links_out(folder, (folder / name for name in names))
    # Kept over all attempts, so that what was uploaded once is not uploaded again.
    contents = {name: text.encode() for name, text in (written or {}).items()}
    data = [CommitOperationAdd(name, contents.get(name, folder / name)) for name in names]

    def attempt() -> str:
        made = _prepare(api, repo_id, private)
        info = api.dataset_info(made)
        there = {file.rfilename for file in info.siblings or ()}
        text = card
        if CARD_NAME in there:
            existing = Path(api.hf_hub_download(made, CARD_NAME, repo_type=KIND, revision=info.sha))
            text = merge_cards(existing.read_bytes().decode(), card)
        old = sorted(name for name in there if Path(name).match(stale) and name not in names)
        commit = api.create_commit(
            made,
            [*data, CommitOperationAdd(CARD_NAME, text.encode()), *map(CommitOperationDelete, old)],
            commit_message=commit_message,
            repo_type=KIND,
            parent_commit=info.sha,
        )
        return str(commit.commit_url)

    return with_retries(api, repo_id, None, attempt)


def public_index(index: Mapping[str, Any]) -> str:
    """The index of a folder of data as it is published: without the folders of somebody's disk.

    Args:
        index: What the folder's holds.
    """
    models = {name: public_name(index[name]) for name in ("base_model", "tokenizer", "sae") if index.get(name)}
    named = {**index, **models, "dataset": dataset_name(index.get("dataset"))}
    return json.dumps(named, indent=2) + "\n"


def data_file(repo_id: str, name: str, *, revision: str | None = None, token: str | bool | None = None) -> Path | None:
    """One small file of a data set on the Hub, downloaded.

    Args:
        repo_id: The repo.
        name: Of the file.
        revision: Branch, tag or commit.
        token: For the Hub.

    Returns:
        Where it lies; None where there is no such data set, or it has no such file.

    Raises:
        InputError: The Hub cannot be reached, or refuses.
    """
    api = HfApi(token=token, library_name="hf_msae")
    try:
        return Path(api.hf_hub_download(repo_id, name, repo_type=KIND, revision=revision))
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None
    except HTTPError as error:
        raise InputError(f"The data set {repo_id} cannot be read from the Hub: {error}") from error


def fetch_data(
    repo_id: str, patterns: Sequence[str], *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """A folder with files of a data set on the Hub, downloaded.

    Args:
        repo_id: The repo.
        patterns: Of the files' names.
        revision: Branch, tag or commit.
        token: For the Hub.

    Raises:
        InputError: There is no such data set, or the Hub cannot be reached.
    """
    try:
        found = snapshot_download(
            repo_id, repo_type=KIND, revision=revision, token=token, allow_patterns=list(patterns)
        )
    except (HTTPError, OSError) as error:
        raise InputError(f"The data set {repo_id} cannot be read from the Hub: {error}") from error
    return Path(found)


def size_category(num_rows: int) -> str:
    """How the Hub calls data sets of that many rows."""
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"]
    return next((name for power, name in enumerate(names, start=3) if num_rows < 10**power), "10B<n<100B")


def _checked_api(repo_id: str, token: str | bool | None) -> HfApi:
    if repo_id.startswith(("models/", "datasets/", "spaces/", "http://", "https://")):
        raise PublishError(f"Data goes to a data set of the Hub; give owner/name rather than {repo_id!r}.")
    return writing_api(token)


def _prepare(api: HfApi, repo_id: str, private: bool | None) -> str:
    """The repo, made if it is not there."""
    made = str(api.create_repo(repo_id, repo_type=KIND, private=private, exist_ok=True).repo_id)
    if private and not api.dataset_info(made).private:
        raise PublishError(
            f"The data set {made} exists and is public, but private was asked for. Make it private in its settings on "
            "the Hub, or push to another repo."
        )
    return made
