"""What people call SAEs elsewhere, and what there is instead: sentences for names that are no repo or no folder.

SAELens has a table of releases, each with an id for every SAE in it; Neuronpedia has ids of its own. Both are names of
SAEs that lie in repos of the Hub, by other names. Where the rule between the two is known it is applied, and otherwise
said where to look.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from hf_msae.formats.common import Files

NAMED = 8
# Gemma Scope's SAEs that SAELens calls canonical are those whose L0 is nearest to this.
CANONICAL_L0 = 100

_GEMMA_RELEASE = re.compile(r"(gemma-scope-(?:2b|9b|27b)-(?:pt|it)-(?:res|mlp|att))(?:-canonical)?")
_NEURONPEDIA = re.compile(r"([\w.-]+)/(\d+)-([\w.-]+)")
_NEURONPEDIA_GEMMA = re.compile(r"gemma-2-(2b|9b)(-it)?/(\d+)-gemmascope-(res|mlp|att)-(\d+k|1m)")


def first_few(names: Sequence[str]) -> str:
    """The first names of many, and how many more there are."""
    more = len(names) - NAMED
    return (", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")) or "no files"


def describe_name(name: str) -> str | None:
    """What somebody may have meant by a name that is no repo of the Hub; None where it looks like an ordinary one."""
    match = _NEURONPEDIA_GEMMA.fullmatch(name)
    if match is not None:
        size, tuning, layer, place, width = match.groups()
        repo = f"google/gemma-scope-{size}-{'it' if tuning else 'pt'}-{place}"
        folder = f"layer_{layer}/width_{width}/average_l0_..."
        return f"It is Neuronpedia's name of an SAE in {repo}: give that repo, with subfolder={folder!r}."
    if _NEURONPEDIA.fullmatch(name) is not None:
        return (
            "It looks like an id of Neuronpedia (model/layer-source), whose page of that source names the repo and "
            "the folder on the Hub; give those, as the repo and subfolder=."
        )
    owner, *rest = PurePosixPath(name).parts or ("",)
    if len(rest) > 1:
        return f"A repo's id has two parts: give {owner}/{rest[0]}, with subfolder={'/'.join(rest[1:])!r}."
    if rest:
        return None
    match = _GEMMA_RELEASE.fullmatch(name)
    if match is not None:
        return f"It is SAELens' name of a release that lies in google/{match[1]}: give that repo, and a subfolder=."
    return (
        "If it is the name of a release in SAELens: its table (pretrained_saes.yaml, in sae_lens) gives the release a "
        "repo_id and each SAE a path; give those, as the repo and subfolder=."
    )


def describe_absence(files: Files) -> str:
    """What there is instead of a folder that a repo, or a folder, does not have."""
    wanted = PurePosixPath(files.subfolder)
    for above in wanted.parents:
        inside = replace(files, subfolder="" if above == PurePosixPath() else str(above))
        if not inside.names:
            continue
        children = sorted({name.partition("/")[0] for name in inside.names if "/" in name}, key=natural_order)
        hint = _canonical(children) if wanted.name == "canonical" else ""
        there = first_few(children or inside.names)
        return f"{files.source} has no folder {files.subfolder!r}; {inside} holds {there}.{hint}"
    return f"{files.source} has no folder {files.subfolder!r}, nor anything else."


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts `layers.2` before `layers.10`."""
    return [
        (int(part), "") if part.isdecimal() and len(part) < 20 else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _canonical(folders: Sequence[str]) -> str:
    l0 = {name: int(match[1]) for name in folders if (match := re.fullmatch(r"average_l0_(\d+)", name))}
    if not l0:
        return ""
    nearest = min(l0, key=lambda name: abs(l0[name] - CANONICAL_L0))
    return f" SAELens calls the one canonical whose L0 is nearest to {CANONICAL_L0}: {nearest}."
