"""An interpretation on disk or on the Hub: pages, columns, streams.

The files lie in the folder `interpretation` beside the SAE: Parquet with a row a latent, which anything that reads
Parquet can read; `hierarchy.json`; and `labels.json`, apart because labels are written later and may be mended by
hand. Read through `datasets`, the rows are memory-mapped, so that a page takes about a millisecond however many there
are.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError

from hf_msae.atomic_files import atomic_file
from hf_msae.errors import InputError
from hf_msae.hub.links import refuse_links_out
from hf_msae.interpret.hierarchy import Edge, Hierarchy
from hf_msae.interpret.pages import Label, LatentPage, name_of, page_from_row
from hf_msae.interpret.writing import (
    FOLDER_NAME,
    HIERARCHY_NAME,
    INDEX_NAME,
    LABELS_NAME,
    VERSION,
    Source,
    row_features,
    shards,
)
from hf_msae.modeling import MatryoshkaSAEConfig
from hf_msae.modeling.untrusted import inside, parse_json, read_json
from hf_msae.process_wide import no_data_warning, no_datasets_bars

if TYPE_CHECKING:
    from datasets import Dataset


class InterpretationError(InputError):
    """There is no interpretation, or it is not one of this SAE."""


class Interpretation:
    """All pages of an SAE's latents.

    `source` says of what they are; `hierarchy` is None where none was found.

    Args:
        folder: where the files lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = _read_source(folder)
        path = folder / HIERARCHY_NAME
        self.hierarchy = _read_hierarchy(path, self.source) if path.is_file() else None
        self.labels = _read_labels(folder)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "Interpretation":
        """Read an interpretation from a folder or from the Hub.

        Args:
            source: an SAE's folder, the folder of the interpretation itself, or a repo on the Hub.
            subfolder: of the SAE in the repo or folder.
            revision: branch, tag or commit of the repo.
            token: for the Hub.

        Raises:
            InterpretationError: there is none.
        """
        return cls(find_folder(source, subfolder=subfolder, revision=revision, token=token))

    def __len__(self) -> int:
        return self.source.num_latents

    def __iter__(self) -> Iterator[LatentPage]:
        return (self.page(latent) for latent in range(len(self)))

    @cached_property
    def dataset(self) -> "Dataset":
        """The rows, a memory-mapped `datasets.Dataset`."""
        from datasets import Dataset
        from datasets.exceptions import DatasetsError

        try:
            with no_datasets_bars():
                rows = Dataset.from_parquet([str(path) for path in shards(self.folder)])
            if rows.features != row_features():
                raise ValueError(f"the columns are {', '.join(rows.column_names)}, or hold something else")
            for name in rows.column_names:
                _check_values(rows.data.column(name), name)
        except (ValueError, TypeError, OSError, NotImplementedError, DatasetsError) as error:
            raise InterpretationError(
                f"The pages in {self.folder} cannot be read ({error!s:.300}). Make them again: `hf-msae interpret`."
            ) from error
        if len(rows) != len(self):
            raise InterpretationError(
                f"{self.folder} has {len(rows):,} rows of {len(self):,} latents; some files are missing."
            )
        return rows

    def page(self, latent: int) -> LatentPage:
        """One latent's page.

        Args:
            latent: its number.

        Raises:
            InterpretationError: there is no such latent, or its page is damaged.
        """
        if not 0 <= latent < len(self):
            raise InterpretationError(f"There is no latent {latent}; they are 0 to {len(self) - 1:,}.")
        parents, children = self._edges.get(latent, ([], []))
        page = page_from_row(self.dataset[latent], self.labels.get(latent), parents, children)
        contexts = [*page.top, *page.sampled]
        if page.latent != latent or not all(
            len(one.tokens) == len(one.activations) and 0 <= one.position < len(one.tokens) for one in contexts
        ):
            raise InterpretationError(
                f"The page of latent {latent} in {self.folder} is damaged. Make them again with `hf-msae interpret`."
            )
        return page

    def column(self, name: str) -> list[Any]:
        """One value of every latent.

        Args:
            name: of the column of the Parquet files, such as "max_activation"; a page's `firing_rate` is "density"
                there.
        """
        return self.dataset[name][:]

    @cached_property
    def names(self) -> list[str]:
        """What to call each latent: its label, or else the tokens at which it peaks."""
        peaks = self.column("peak_tokens")
        return [name_of(tokens, self.labels.get(latent)) for latent, tokens in enumerate(peaks)]

    @cached_property
    def _edges(self) -> dict[int, tuple[list[Edge], list[Edge]]]:
        """The edges from each latent's parents, and to its children."""
        tree = self.hierarchy
        if tree is None:
            return {}
        with_edges = {latent for edge in tree.edges for latent in (edge.parent, edge.child)}
        parents: dict[int, list[Edge]] = {}
        for edge in tree.edges:
            parents.setdefault(edge.child, []).append(edge)
        return {latent: (parents.get(latent, []), tree.children(latent)) for latent in with_edges}

    def save_labels(self, labels: Mapping[int, Label]) -> None:
        """Add labels, or replace those of the same latents.

        Args:
            labels: by the latent's number.
        """
        self.labels = dict(sorted({**self.labels, **labels}.items()))
        text = json.dumps({str(latent): asdict(label) for latent, label in self.labels.items()}, indent=1)
        with atomic_file(self.folder / LABELS_NAME) as draft:
            draft.write_text(text + "\n", encoding="utf-8")
        self.__dict__.pop("names", None)

    def push(self, repo_id: str, *, subfolder: str | None = None, token: str | bool | None = None) -> str:
        """Publish it beside the SAE in a repo, in one commit.

        Args:
            repo_id: of the SAE.
            subfolder: of the SAE in the repo.
            token: for the Hub, which may write.

        Returns:
            The commit's address.

        Raises:
            InterpretationError: the Hub refuses.
        """
        path = "/".join(filter(None, (inside(subfolder or ""), FOLDER_NAME)))
        names = [name for name in (INDEX_NAME, HIERARCHY_NAME, LABELS_NAME) if (self.folder / name).is_file()]
        names += [shard.name for shard in shards(self.folder)]
        refuse_links_out(self.folder, (self.folder / name for name in names))
        try:
            with no_data_warning():
                commit = HfApi(token=token).upload_folder(
                    repo_id=repo_id,
                    folder_path=self.folder,
                    path_in_repo=path,
                    allow_patterns=names,
                    commit_message="Upload an interpretation",
                    delete_patterns="latents-*.parquet",
                )
        except (HfHubHTTPError, HFValidationError) as error:
            raise InterpretationError(
                f"The interpretation could not be pushed to {repo_id}: {error}. Push the SAE first (`hf-msae push`), "
                "and log in with a token that may write (`hf auth login`)."
            ) from error
        return str(commit.commit_url)


def stream_pages(
    repo_id: str, *, subfolder: str | None = None, revision: str | None = None, token: str | bool | None = None
) -> Iterator[LatentPage]:
    """The pages of an interpretation on the Hub, each fetched when it is asked for, without labels and edges.

    Args:
        repo_id: of the SAE.
        subfolder: of the SAE in the repo.
        revision: branch, tag or commit of the repo.
        token: for the Hub.
    """
    from datasets import load_dataset

    path = "/".join(filter(None, (inside(subfolder or ""), FOLDER_NAME, "latents-*.parquet")))
    ref = f"@{revision}" if revision else ""
    files = f"hf://{repo_id}{ref}/{path}"
    rows = load_dataset("parquet", data_files=files, split="train", streaming=True, token=token)
    return (page_from_row(row) for row in rows)


def find_folder(
    source: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder with the interpretation's files, downloaded where the source is a repo.

    Args:
        source: an SAE's folder, the folder of the interpretation itself, or a repo on the Hub.
        subfolder: of the SAE in the repo or folder.
        revision: branch, tag or commit of the repo.
        token: for the Hub.

    Raises:
        InterpretationError: there is none.
    """
    inner = inside(subfolder or "")
    local = Path(source) / inner
    if Path(source).is_dir():
        for folder in (local / FOLDER_NAME, local):
            if (folder / INDEX_NAME).is_file():
                return folder
        raise InterpretationError(f"{local} holds no interpretation; make one with `hf-msae interpret {local}`.")
    path = f"{inner}/{FOLDER_NAME}" if inner else FOLDER_NAME
    try:
        root = snapshot_download(str(source), revision=revision, token=token, allow_patterns=f"{path}/*")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InterpretationError(f"{source} is neither a folder nor a repo that can be read: {error}") from error
    if not (Path(root) / path / INDEX_NAME).is_file():
        raise InterpretationError(f"The repo {source} holds no interpretation in {path}.")
    return Path(root) / path


def _read_source(folder: Path) -> Source:
    path = folder / INDEX_NAME
    try:
        source = Source(**read_json(path))
        _check_source(source)
    except (OSError, TypeError, ValueError, StrictDataclassError) as error:
        words = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        raise InterpretationError(
            f"{path} cannot be read: {words!s:.300} Make it again with `hf-msae interpret`."
        ) from error
    if source.version > VERSION:
        raise InterpretationError(f"{path} was written by a later version of hf_msae; update it.")
    return source


def _check_source(source: Source) -> None:
    """Refuse what cannot be of an SAE, with a TypeError or ValueError."""
    counts = (source.num_latents, source.num_tokens, source.context_length, source.version, source.num_outliers)
    texts = (source.dataset, source.base_model or "", source.site or "")
    sizes = source.prefix_sizes
    if type(sizes) is not list or not sizes or any(type(n) is not int or n < 0 for n in (*counts, *sizes)):
        raise TypeError("a size or a count is no whole number.")
    if not all(isinstance(text, str) for text in texts) or type(source.norm_limit) not in (type(None), int, float):
        raise TypeError("a value is of another type than `hf-msae interpret` writes.")
    # The same bounds as an SAE's.
    MatryoshkaSAEConfig(num_latents=source.num_latents, prefix_sizes=source.prefix_sizes, k=1)


def _check_values(values: Any, name: str) -> None:
    """Refuse a column that holds nulls, or a list or a field in it that does; only quantiles may be missing."""
    for part in values.chunks:
        inner = {name: part}
        while inner:
            name, array = inner.popitem()
            if array.null_count and name != "quantile":
                raise ValueError(f"{name} is missing in places")
            if str(array.type).startswith("list<"):
                inner[name] = array.flatten()
            elif str(array.type).startswith("struct<"):
                inner |= {field.name: array.field(field.name) for field in array.type}


def _read_hierarchy(path: Path, source: Source) -> Hierarchy:
    try:
        found = Hierarchy.from_json(path.read_text(encoding="utf-8"))
        if found.prefix_sizes != source.prefix_sizes:
            raise ValueError(f"it is of an SAE of {found.prefix_sizes[-1]} latents, not {source.prefix_sizes[-1]}.")
    except ValueError as error:
        raise InterpretationError(f"{path} cannot be read: {error} Make it again with `hf-msae interpret`.") from error
    return found


def _read_labels(folder: Path) -> dict[int, Label]:
    path = folder / LABELS_NAME
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_bytes(), str(path))
        labels = {int(latent): Label(**label) for latent, label in found.items()}
        for label in labels.values():
            if not isinstance(label.text, str):
                raise TypeError(f"the text of a label is {label.text!r}")
            if not all(score is None or isinstance(score, int | float) for score in (label.detection, label.fuzzing)):
                raise TypeError("the scores of a label are numbers")
        return labels
    except (TypeError, ValueError, AttributeError) as error:
        raise InterpretationError(
            f'{path} must hold {{"latent": {{"text": ...}}}} for each labelled latent: {error!s:.300}'
        ) from error
