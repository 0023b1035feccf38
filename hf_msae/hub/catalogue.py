"""What SAEs the Hub holds for a language model, ours and other libraries', found by metadata alone.

The Hub is asked for models by tags (`base_model` and what SAEs are called), by what their ids contain, and for the
releases that are known by name. What is in a repo is read from our index or from configurations and names of files;
no weights are fetched. What belongs to another language model, as far as its files say, is left out.
"""

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import HfApi, ModelInfo, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import httpx

from hf_msae.formats.common import Files, FormatError, Outline
from hf_msae.formats.conversion import library_of, outline, places_of_weights, recognise
from hf_msae.formats.known_releases import RELEASES, named_after
from hf_msae.hub.index import CONFIG_NAME, INDEX_NAME, NoSAEError, SAEEntry, find_entries
from hf_msae.worlds.stories import STORIES

logger = logging.getLogger(__name__)

OURS = "hf_msae"
# What repos of SAEs are tagged with, by their libraries or by people.
TAGS = (
    OURS,
    "saelens",
    "sparse-autoencoder",
    "sparse-autoencoders",
    "sae",
    "transcoder",
    "dictionary-learning",
    "mechanistic-interpretability",
)
# What the ids of such repos contain beside the name of the language model.
NAMES = ("sae-{}", "{}-sae", "saebench_{}", "transcoder-{}", "{}-transcoder")
CONFIGURATIONS = ("cfg.json", "config.json", "hyperparams.json")
# Formats whose names say all that is listed.
TOLD_BY_NAMES = ("gemma_scope", "qwen_scope", "goodfire")
# Repos that are looked into, and the largest number of configurations that is fetched of one.
MAX_REPOS = 100
MAX_CONFIGURATIONS = 500


@dataclass(frozen=True)
class FoundSAE:
    """An SAE on the Hub. What neither files nor names say is None.

    Args:
        repo: Its repo.
        subfolder: Its folder or file there; empty for one at the root.
        library: "hf_msae", or whose checkpoint it is.
        base_model: The language model, as its files name it.
        site: The place that it reads.
        site_out: The place that a transcoder writes.
        num_latents: Size of the dictionary.
        prefix_sizes: Its nested sizes, as they are read.
        loads: Whether `load` reads it as it stands.
        load: The Python expression that loads it.
        command: The command that brings it here as an SAE of ours.
        note: What else has to be given, or why it is not read; None where nothing is to be said.
    """

    repo: str
    subfolder: str
    library: str
    base_model: str | None
    site: str | None
    site_out: str | None
    num_latents: int | None
    prefix_sizes: list[int] | None
    loads: bool
    load: str
    command: str
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


def find_saes(base_model: str, *, token: str | bool | None = None, max_repos: int = MAX_REPOS) -> list[FoundSAE]:
    """Find the SAEs of a language model on the Hub.

    Args:
        base_model: The language model's id on the Hub.
        token: A token that may read; the one that is logged in by default.
        max_repos: How many repos are looked into, those first that name the model as their `base_model`.

    Returns:
        The SAEs by repo, ours first, in the order of their folders; empty where none was found.

    Raises:
        NoSAEError: The Hub has no such model, or cannot be asked.
    """
    if base_model == STORIES:
        raise NoSAEError(
            f"{STORIES!r} is in the package and not on the Hub, so no repo there is known to be of it; train an SAE "
            "with `hf-msae train`."
        )
    api = HfApi(token=token)
    with _explained_absence(base_model):
        model = _Model(base_model, api.model_info(base_model).id)
        found: list[FoundSAE] = []
        for repo in islice(_candidates(api, model, max_repos), max_repos):
            found += _look_into(api, repo, model, token)
    return sorted(found, key=lambda sae: (sae.library != OURS, not sae.loads, sae.repo.lower()))


@dataclass(frozen=True)
class _Model:
    """A language model by the name that was given, and by its id on the Hub, which may be another one."""

    given: str
    id: str

    @property
    def short(self) -> str:
        """The id without its owner."""
        return self.id.rpartition("/")[2]

    def is_called(self, name: str) -> bool:
        """Whether an SAE's files mean this model by a name."""
        whole = name.lower() in (self.given.lower(), self.id.lower())
        return whole or ("/" not in name and name.lower() == self.short.lower())

    def is_named_by(self, repo: ModelInfo) -> bool:
        """Whether a repo's tags or its id name this model, and not one that is called after it."""
        if f"base_model:{self.id}" in (repo.tags or ()):
            return True
        if any(text.lower() in repo.id.lower() for text in named_after(self.id)):
            return True
        called_after = r"(?![\w.]|-(?:it|pt|instruct|chat|base)\b)"
        return re.search(rf"(?<![\w.]){re.escape(self.short)}{called_after}", repo.id, re.IGNORECASE) is not None


@contextmanager
def _explained_absence(base_model: str) -> Iterator[None]:
    """Turn the Hub's refusal to tell of a language model into `NoSAEError`s that say what to do."""
    try:
        yield
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NoSAEError(
            f"There is no model {base_model} on the Hub that you may see; give the id of one (owner/name)."
        ) from error
    except (OfflineModeIsEnabled, httpx.TransportError) as error:
        first = str(error).split("\n", 1)[0]
        raise NoSAEError(
            f"The Hub cannot be asked which SAEs there are of {base_model} ({first}): connect, and unset "
            "HF_HUB_OFFLINE if it is set."
        ) from error


def _candidates(api: HfApi, model: _Model, limit: int) -> Iterator[str]:
    """Repos that may hold SAEs of a model, each once."""
    seen: set[str] = set()
    for repos in _searches(api, model, limit):
        for repo in repos:
            if repo not in seen:
                seen.add(repo)
                yield repo


def _searches(api: HfApi, model: _Model, limit: int) -> Iterator[Iterable[str]]:
    """The ids that one question after another finds."""

    def ask(**question: Any) -> Iterable[str]:
        return (info.id for info in api.list_models(limit=limit, **question))

    for tag in TAGS:
        yield ask(filter=[f"base_model:{model.id}", tag])
    yield [release.repo for release in RELEASES if model.is_called(release.base_model)]
    for text in (*named_after(model.id), *(form.format(model.short) for form in NAMES)):
        yield ask(search=text)
    for tag in TAGS:
        yield ask(filter=tag, search=model.short)


def _look_into(api: HfApi, repo: str, model: _Model, token: str | bool | None) -> list[FoundSAE]:
    """The SAEs of a model in a repo; none where the repo is not there, or nothing of it can be read."""
    try:
        info = api.model_info(repo)
        hub: dict[str, Any] = {"revision": info.sha, "token": token}
        name = recognise(Files(repo, **hub))
        names = {sibling.rfilename for sibling in info.siblings or ()}
        ours = INDEX_NAME in names or (name is None and any(PurePosixPath(path).name == CONFIG_NAME for path in names))
        found = [_found_ours(repo, entry) for entry in find_entries(repo, **hub)] if ours else []
        if name is not None:
            found += _found_others(repo, name, names, hub)
    except (HfHubHTTPError, NoSAEError, FormatError) as error:
        logger.warning("%s was not looked into: %s", repo, str(error).split("\n", 1)[0])
        return []
    named = model.is_named_by(info)
    return [sae for sae in found if (named if sae.base_model is None else model.is_called(sae.base_model))]


def _found_ours(repo: str, entry: SAEEntry) -> FoundSAE:
    return FoundSAE(
        repo=repo,
        subfolder=entry.subfolder,
        library=OURS,
        base_model=entry.base_model,
        site=entry.site,
        site_out=entry.site_out,
        num_latents=entry.num_latents,
        prefix_sizes=list(entry.prefix_sizes),
        loads=True,
        load=_load(repo, entry.subfolder),
        command=_command("pull", repo, entry.subfolder),
    )


def _found_others(repo: str, name: str, names: Collection[str], hub: dict[str, Any]) -> Iterator[FoundSAE]:
    """Another library's SAEs in a repo, as their configurations outline them."""
    configurations = [path for path in names if PurePosixPath(path).name in CONFIGURATIONS]
    files = Files(repo, **hub)
    many = len(configurations) > MAX_CONFIGURATIONS
    if name not in TOLD_BY_NAMES and not many:
        # At once, rather than one after another.
        snapshot_download(repo, allow_patterns=configurations, **hub)
    for place in places_of_weights(name, files):
        unread = Outline(needs=f"Its {len(configurations):,} configurations were too many to read them.")
        told = unread if many and name not in TOLD_BY_NAMES else outline(name, repo, place, **hub)
        subfolder = "" if place == "." else place
        sizes = None if told.prefix_sizes is None else [int(size) for size in told.prefix_sizes]
        yield FoundSAE(
            repo=repo,
            subfolder=subfolder,
            library=library_of(name),
            base_model=told.base_model,
            site=told.site,
            site_out=told.site_out,
            num_latents=told.num_latents,
            prefix_sizes=sizes,
            loads=told.needs is None,
            load=_load(repo, subfolder),
            command=_command("convert", repo, subfolder),
            note=told.needs,
        )


def _load(repo: str, subfolder: str) -> str:
    return f"MatryoshkaSAE.from_pretrained({repo!r}{f', subfolder={subfolder!r}' if subfolder else ''})"


def _command(verb: str, repo: str, subfolder: str) -> str:
    folder = PurePosixPath("saes", repo.rpartition("/")[2], subfolder)
    return f"hf-msae {verb} {repo} {folder}{f' --subfolder {subfolder}' if subfolder else ''}"
