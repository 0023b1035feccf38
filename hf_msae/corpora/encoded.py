"""A data set of latents that is there: opened from a folder or from the Hub, checked, published."""

from pathlib import Path
from typing import Any

from hf_msae.corpora.card import render_card
from hf_msae.corpora.encoded_files import CARD_NAME, FORMAT, SHARDS, EncodedError, is_encoded, read_index
from hf_msae.corpora.reading import sae_fingerprint
from hf_msae.data.unfinished import INDEX, MAX_INDEX_BYTES, unfinished_folder
from hf_msae.hub.data_sets import data_file, fetch_data, public_index, push_data
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.modeling.untrusted import read_json


class EncodedLatents:
    """What `encode_dataset` wrote.

    Args:
        folder: with the files.

    Attributes:
        index: the contents of index.json: what was encoded by what, and the shards.

    Raises:
        EncodedError: there is no complete data set of latents, or it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index: dict[str, Any] = read_index(self.folder)

    @classmethod
    def load(
        cls, source: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> "EncodedLatents":
        """Open a folder, or a data set of the Hub, which is downloaded.

        Args:
            source: which.
            revision: branch, tag or commit of a data set on the Hub.
            token: for the Hub.

        Raises:
            EncodedError: there are no latents.
        """
        if Path(source).is_dir() or unfinished_folder(Path(source)).is_dir():
            return cls(source)
        if not is_encoded_source(str(source), revision=revision, token=token):
            raise EncodedError(f"{source} is neither a folder nor a data set of the Hub with latents.")
        return cls(fetch_data(str(source), [INDEX, CARD_NAME, SHARDS], revision=revision, token=token))

    @property
    def description(self) -> str:
        """What a person would call it."""
        return str(self.index["dataset"])

    @property
    def pool(self) -> str | None:
        """How the tokens of a document were pooled; None where each has a row."""
        pool: str | None = self.index["pool"]
        return pool

    def check_sae(self, sae: MatryoshkaSAE) -> None:
        """Raises `EncodedError` where the latents are those of another SAE, or of a smaller prefix of this one."""
        ours, theirs = sae_fingerprint(sae), self.index["sae_fingerprint"]
        sizes, written = sae.config.prefix_sizes, self.index["prefix_sizes"]
        if ours != theirs:
            raise EncodedError(
                f"The latents {self.folder} were encoded by another SAE ({self.index.get('sae') or 'unnamed'} of "
                f"{self.index.get('base_model')}); give that one, or encode the text again with this one."
            )
        if written[-1] < sizes[-1]:
            raise EncodedError(
                f"The latents {self.folder} are those of the prefix of {written[-1]:,}, and the SAE has "
                f"{sizes[-1]:,}; give --prefix {written[-1]}, or encode the text again."
            )

    def push(self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
        """Publish it as a data set, in one commit; `datasets.load_dataset(repo_id)` then reads it.

        Args:
            repo_id: owner/name; made where it is not there.
            private: whether a repo that is made is private.
            token: one that may write; the one that is logged in by default.

        Returns:
            The commit's address.

        Raises:
            PublishError: the Hub refuses, or cannot be reached.
        """
        names = [INDEX, *(shard["file"] for shard in self.index["shards"])]
        return push_data(
            self.folder,
            names,
            render_card(self.index, repo_id),
            repo_id,
            stale=SHARDS,
            written={INDEX: public_index(self.index)},
            private=private,
            commit_message="Upload latents",
            token=token,
        )


def is_encoded_source(source: str, *, revision: str | None = None, token: str | bool | None = None) -> bool:
    """Whether a folder, or a data set of the Hub, holds latents.

    Args:
        source: which.
        revision: branch, tag or commit of a data set on the Hub.
        token: for the Hub.
    """
    if Path(source).exists():
        return is_encoded(source)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        return False
    index = data_file(source, INDEX, revision=revision, token=token)
    try:
        return index is not None and read_json(index, max_bytes=MAX_INDEX_BYTES).get("format") == FORMAT
    except ValueError:
        return False
