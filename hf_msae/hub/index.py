"""Several SAEs in one repo: what there is, and loading some of them.

Each SAE has its folder with its `config.json`; those are the truth. `sae_index.json` at the root repeats what people
choose by, so that a repo of hundreds of SAEs is listed by one request; every push brings it up to date.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)

from hf_msae.errors import InputError
from hf_msae.formats.common import Files, peek_json
from hf_msae.formats.conversion import describe_library_checkpoints
from hf_msae.formats.naming import natural_order
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.modeling.untrusted import inside, parse_json, read_json
from hf_msae.sites import Site

INDEX_NAME = "sae_index.json"
CONFIG_NAME = "config.json"
VERSION = 1
# Folders of a run whose contents are no result.
UNFINISHED = re.compile(r"checkpoint-\d+(\..+)?|last-checkpoint|\..+")
# How the token embedding's module is called across architectures.
EMBEDDINGS = ("embeddings", "embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "shared")
ATTENTION = re.compile(r"(\w+_)?attn|(\w+_)?attention(\.(output\.)?dense|\.attn)?")
MLP = re.compile(
    r"(\w+_)?mlp(_block)?(\.dense_4h_to_h)?|feed_forward|ffn(\.down_proj)?|block_sparse_moe|moe|fc2|output\.dense"
)
NUM_SHOWN = 20


class NoSAEError(InputError):
    """A repo, a folder, a revision or a site that is not there, or something else than asked for."""


@dataclass(frozen=True)
class SAEEntry:
    """What people choose an SAE by.

    Args:
        subfolder: Its folder; empty for one at the root.
        site: The place in the language model.
        base_model: The language model.
        hidden_size: Size of the activations.
        num_latents: Size of the dictionary.
        prefix_sizes: Sizes of its nested prefixes.
        k: Active latents per token, wanted.
        activation: As in `MatryoshkaSAEConfig`.
        l0: Active latents per token of the whole dictionary on held-out tokens; None where it was not measured.
        fve: Fraction of variance explained by the whole dictionary there; None where it was not measured.
        site_out: The place that a transcoder reconstructs; None of an SAE.
    """

    subfolder: str
    site: str | None
    base_model: str | None
    hidden_size: int
    num_latents: int
    prefix_sizes: list[int]
    k: float
    activation: str
    l0: float | None = None
    fve: float | None = None
    site_out: str | None = None


def _of_config() -> list[str]:
    """The fields of an entry that are those of the configuration."""
    return [field.name for field in fields(SAEEntry) if field.name not in ("subfolder", "l0", "fve")]


def make_entry(subfolder: str, config: MatryoshkaSAEConfig) -> SAEEntry:
    """The entry of an SAE."""
    per_level = [(config.measured or {}).get(name, ()) for name in ("l0", "fve")]
    # A prefix that was no level of the run has numbers for the levels inside it only.
    l0, fve = (values[-1] if len(values) == config.num_levels else None for values in per_level)
    return SAEEntry(subfolder, **{name: getattr(config, name) for name in _of_config()}, l0=l0, fve=fve)


def format_index(entries: Sequence[SAEEntry]) -> str:
    """The text of `sae_index.json`, in the order of the subfolders."""
    ordered = sorted(entries, key=lambda entry: natural_order(entry.subfolder))
    return json.dumps({"version": VERSION, "saes": [asdict(entry) for entry in ordered]}, indent=2) + "\n"


def parse_index(text: str | bytes, where: str) -> list[SAEEntry]:
    """The entries of `sae_index.json`. Raises `NoSAEError` where it is no such index, or of a later version."""
    try:
        index = parse_json(text, INDEX_NAME)
        if index["version"] > VERSION:
            raise NoSAEError(
                f"{INDEX_NAME} of {where} has version {index['version']}, and this hf_msae knows up to {VERSION}: "
                "update hf_msae."
            )
        entries = [_read_entry(entry) for entry in index["saes"]]
        return [entry for entry in entries if not any(map(UNFINISHED.fullmatch, entry.subfolder.split("/")))]
    except NoSAEError:
        raise
    except (ValueError, StrictDataclassError, KeyError, TypeError, AttributeError) as error:
        raise NoSAEError(
            f"{INDEX_NAME} of {where} is no index of SAEs ({type(error).__name__}: {error}); delete it from the repo, "
            "and the next push makes it anew."
        ) from error


def _read_entry(values: Mapping[str, Any]) -> SAEEntry:
    """One entry of the index, checked as its configuration would be. Raises what is wrong with it."""
    entry = SAEEntry(**{field.name: values[field.name] for field in fields(SAEEntry) if field.name in values})
    if inside(entry.subfolder) != entry.subfolder or re.search(r"(^|/)[.-]", entry.subfolder):
        raise InputError(f"{entry.subfolder!r} is no folder of an SAE")
    MatryoshkaSAEConfig(**{name: getattr(entry, name) for name in _of_config()})
    if not all(value is None or isinstance(value, int | float) for value in (entry.l0, entry.fve)):
        raise TypeError(f"l0 and fve are numbers, got {entry.l0!r} and {entry.fve!r}")
    return entry


def list_saes(
    source: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> list[SAEEntry]:
    """List the SAEs in a Hub repo or a folder.

    Args:
        source: The repo's id or the folder.
        revision: Branch, tag or commit.
        token: A token that may read; the one that is logged in by default.
        cache_dir: The Hub's cache, where another than the usual one is meant.
        local_files_only: Whether to read only what was downloaded before.

    Returns:
        Their entries, in the order of their subfolders, numbers by size.

    Raises:
        NoSAEError: There is no such repo or revision, or it holds no Matryoshka SAE; then the error says what it
            holds, and what reads that.
    """
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    entries = find_entries(source, **hub)
    if not entries:
        raise NoSAEError(f"{source} holds no Matryoshka SAE. {describe_contents(source, **hub)}")
    return entries


def find_entries(source: str | Path, **hub: Any) -> list[SAEEntry]:
    """List SAEs as `list_saes` does, and none where there is none.

    Args:
        source: The repo's id or the folder.
        hub: The other arguments of `list_saes`.

    Returns:
        Their entries.

    Raises:
        NoSAEError: There is no such repo or revision, or an SAE's configuration is damaged.
    """
    if Path(source).is_dir():
        return _entries_of_folder(Path(source))
    with explained_refusals(source, hub.get("revision")):
        try:
            index = hf_hub_download(str(source), INDEX_NAME, **hub)
        except EntryNotFoundError:
            patterns = [CONFIG_NAME, f"*/{CONFIG_NAME}"]
            return _entries_of_folder(Path(snapshot_download(str(source), allow_patterns=patterns, **hub)))
        return parse_index(Path(index).read_bytes(), str(source))


def _entries_of_folder(folder: Path) -> list[SAEEntry]:
    entries = []
    for path in folder.rglob(CONFIG_NAME):
        parts = path.relative_to(folder).parts[:-1]
        if any(UNFINISHED.fullmatch(part) for part in parts) or not is_ours(path):
            continue
        try:
            config = MatryoshkaSAEConfig.from_json_file(path)
        except ValueError as error:
            raise NoSAEError(str(error)) from error
        entries.append(make_entry(PurePosixPath(*parts).as_posix() if parts else "", config))
    return sorted(entries, key=lambda entry: natural_order(entry.subfolder))


def model_type(path: Path) -> str | None:
    """The `model_type` that a `config.json` names, None where it names none."""
    try:
        found = read_json(path).get("model_type")
    except (ValueError, OSError):
        return None
    return found if isinstance(found, str) else None


def is_ours(path: Path) -> bool:
    """Whether a `config.json` is of a Matryoshka SAE."""
    return model_type(path) == MatryoshkaSAEConfig.model_type


def describe_contents(source: str | Path, **hub: Any) -> str:
    """A sentence on what a repo or a folder without SAEs of ours holds, and what reads it."""
    files = Files(source, **hub)
    kind = peek_json(files, CONFIG_NAME).get("model_type")
    if isinstance(kind, str):
        return f"It holds a model of the type {kind!r}."
    found = describe_library_checkpoints(files)
    if found is not None:
        return found
    names = sorted({name.partition("/")[0] for name in files.names} - {".gitattributes"})
    shown = ", ".join(names[:NUM_SHOWN]) or "nothing"
    # They may lead anywhere, and back to where one came from.
    links = sorted(path.name for path in Path(source).iterdir() if path.is_symlink()) if files.is_local else []
    links = [name for name in links if (Path(source) / name).is_dir()]
    not_followed = f" Links to folders are not followed: {', '.join(links[:NUM_SHOWN])}." if links else ""
    return f"It holds {shown}{' …' if len(names) > NUM_SHOWN else ''}.{not_followed}"


@contextmanager
def explained_refusals(source: str | Path, revision: str | None) -> Iterator[None]:
    """Turn the Hub's refusals to read into `NoSAEError`s that say what to do."""
    try:
        yield
    except HFValidationError as error:
        raise NoSAEError(f"{source} is neither a folder nor the id of a Hub repo (owner/name): {error}") from error
    except RevisionNotFoundError as error:
        raise NoSAEError(
            f"{source} has no revision {revision!r}; give a branch, a tag or a commit that it has."
        ) from error
    except RepositoryNotFoundError as error:
        raise NoSAEError(
            f"There is no folder and no Hub repo {source} that you may read. Check the spelling; for a private or "
            f"gated repo, log in (`hf auth login`) or give a token that may read it. ({error.response.status_code})"
        ) from error
    except RemoteEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        raise NoSAEError(f"{source} is not in the local cache, and the Hub cannot be asked: {error}") from error


# Loading


def load_saes(
    source: str | Path,
    sites: str | Sequence[str] | None = None,
    prefix: int | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> dict[str, MatryoshkaSAE]:
    """Load the SAEs of a Hub repo or a folder.

    Args:
        source: The repo's id or the folder.
        sites: Only those at these sites, by their paths (`model.layers.12:output`) or short forms (`layers.12`,
            `layers.12.mlp`, `layers.12.attn`, `embeddings`).
        prefix: Only the first latents of each.
        revision: Branch, tag or commit.
        token: A token that may read; the one that is logged in by default.
        cache_dir: The Hub's cache, where another than the usual one is meant.
        local_files_only: Whether to read only what was downloaded before.
        kwargs: More for `MatryoshkaSAE.from_pretrained`, such as `device_map` and `dtype`.

    Returns:
        The SAEs by their subfolders; the one at the root has the key "".

    Raises:
        NoSAEError: As for `list_saes`, and for a site that none of them reads.
    """
    hub: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    entries = choose(list_saes(source, **hub), sites)
    if prefix is not None:
        kwargs["prefix"] = prefix
    return {
        entry.subfolder: MatryoshkaSAE.from_pretrained(source, subfolder=entry.subfolder, **hub, **kwargs)
        for entry in entries
    }


def choose(entries: Sequence[SAEEntry], sites: str | Sequence[str] | None) -> list[SAEEntry]:
    """Choose the entries at some sites.

    Args:
        entries: What there is.
        sites: As for `load_saes`; None for all.

    Returns:
        The chosen ones, in their order.

    Raises:
        NoSAEError: None of them reads one of the sites.
    """
    if sites is None:
        return list(entries)
    chosen: set[str] = set()
    for site in [sites] if isinstance(sites, str) else sites:
        exact = [entry for entry in entries if entry.site == site]
        found = exact or [entry for entry in entries if entry.site is not None and is_same_site(site, entry.site)]
        if not found:
            there = sorted({str(entry.site) for entry in entries}, key=natural_order)
            raise NoSAEError(f"None of the SAEs reads the site {site!r}; there are {', '.join(there)}.")
        chosen |= {entry.subfolder for entry in found}
    return [entry for entry in entries if entry.subfolder in chosen]


def is_same_site(short: str, path: str) -> bool:
    """Whether a short form may name the site of a module path, as far as the names alone tell: no model is asked."""
    return _site_key(short) == _site_key(path)


def _site_key(text: str) -> tuple[int | None, str, str]:
    """Layer, module in it, and side."""
    site = Site.parse(text)
    parts = site.path.split(".")
    layer = next((index for index, part in enumerate(parts) if re.fullmatch(r"-?\d+", part)), None)
    if layer is None:
        return None, "embeddings" if parts[-1] in EMBEDDINGS else site.path, site.io
    inside = ".".join(parts[layer + 1 :])
    if ATTENTION.fullmatch(inside):
        inside = "attn"
    elif MLP.fullmatch(inside):
        inside = "mlp"
    return int(parts[layer]), inside, site.io
