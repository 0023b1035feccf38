"""Public releases whose files do not say at which sizes their SAEs are nested, while their authors do elsewhere.

An entry stands here only where its source, by the authors themselves, states the widths. So these nested releases are
not here: Gemma Scope 2, of which no text or file names widths; SAEBench's and others of dictionary_learning, those of
the original Matryoshka code, and what later versions of SAELens export, whose files record them.
"""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Release:
    """SAEs of one repo that are nested alike.

    Args:
        repo: Its id on the Hub.
        folders: A regular expression of the folders that hold these SAEs, in the repo.
        base_model: The language model.
        site: Where in it, with `{}` for the layer.
        prefix_sizes: The nested widths; the last is the whole dictionary.
        source: Where the authors state them.
    """

    repo: str
    folders: str
    base_model: str
    site: str
    prefix_sizes: tuple[int, ...]
    source: str


_CHANIND = (128, 512, 2048, 8192, 32768)
RELEASES = (
    Release(
        "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40",
        r"(standard|snap)/blocks\.\d+\.hook_resid_post",
        "google/gemma-2-2b",
        "layers.{}",
        _CHANIND,
        "its model card on the Hub",
    ),
    Release(
        "chanind/gemma-2-9b-batch-topk-matryoshka-saes-w-32k-l0-60",
        r"blocks\.\d+\.hook_resid_post",
        "google/gemma-2-9b",
        "layers.{}",
        _CHANIND,
        "its model card on the Hub",
    ),
    Release(
        "chanind/gemma-3-1b-batch-topk-matryoshka-saes-w-32k-l0-40",
        r"blocks\.\d+\.hook_resid_post",
        "google/gemma-3-1b-pt",
        "layers.{}",
        _CHANIND,
        "its model card on the Hub",
    ),
)


# What the ids of repos contain in which SAEs of a language model were released, by the model's id. These do not name
# their language model by tags, nor as the Hub does.
NAMED_AFTER = (
    (re.compile(r"google/gemma-2-(2b|9b|27b)"), "gemma-scope-{}-pt-"),
    (re.compile(r"google/gemma-2-(2b|9b|27b)-it"), "gemma-scope-{}-it-"),
    (re.compile(r"google/gemma-3-(270m|1b|4b|12b|27b)(?:-pt)?"), "gemma-scope-2-{}-pt"),
    (re.compile(r"google/gemma-3-(270m|1b|4b|12b|27b)-it"), "gemma-scope-2-{}-it"),
    (re.compile(r"Qwen/(Qwen.+)"), "SAE-Res-{}-W"),
    (re.compile(r"meta-llama/(Llama-3\..+)"), "{}-SAE-l"),
)


def named_after(base_model: str) -> list[str]:
    """What the ids of repos contain in which SAEs of a language model were released."""
    matches = ((pattern.fullmatch(base_model), form) for pattern, form in NAMED_AFTER)
    return [form.format(match[1]) for match, form in matches if match is not None]


def release_of(source: str | Path, subfolder: str) -> Release | None:
    """The release that a checkpoint is of.

    Args:
        source: A repo's id; or a folder of this machine, which tells by its own name, or by that of one above it (the
            repo's, or that of the repo in the Hub's cache).
        subfolder: The checkpoint's folder in it.

    Returns:
        The release; None where it is of none.
    """
    local = Path(source).is_dir()
    place = f"{Path(source).resolve().as_posix() if local else source}/{subfolder}".strip("/")
    return next((release for release in RELEASES if _holds(release, place, local)), None)


def _holds(release: Release, place: str, local: bool) -> bool:
    """Whether a place, a path from the repo's id or from a root of this machine, is one of a release's folders."""
    owner, name = map(re.escape, release.repo.split("/"))
    repo = f"(?:.*/)?(?:{name}|models--{owner}--{name}/snapshots/[^/]+)" if local else f"{owner}/{name}"
    return re.fullmatch(f"{repo}/{release.folders}", place, re.IGNORECASE) is not None
