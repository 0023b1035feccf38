"""`hf-msae find-saes`: what SAEs the Hub holds for a language model."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

from hf_msae.cli import common_fields
from hf_msae.cli.parser import build_parser, parse
from hf_msae.errors import InputError

if TYPE_CHECKING:
    from hf_msae.hub import FoundSAE

DESCRIPTION = """\
List the SAEs of a language model on the Hub, ours and other libraries': where they read, how wide they are and at
which sizes they are nested, whether they load as they stand, and the command that fetches each. The Hub is asked by
tags and names, and configurations are read; no weights are fetched."""
SITES_SHOWN = 4


@dataclass
class FindSAEsArguments:
    """What is looked for."""

    _argument_group_name = "find-saes"
    _positional = ("model",)

    model: str = field(metadata={"help": "The language model's id on the Hub, such as google/gemma-2-2b."})
    max_repos: int = field(default=100, metadata={"help": "How many repos to look into."})
    json: bool = common_fields.as_json()

    def __post_init__(self) -> None:
        if self.max_repos < 1:
            raise InputError(f"max_repos must be at least 1, got {self.max_repos}.")


def run(arguments: list[str]) -> None:
    """Parse, look, print."""
    (args,) = parse(build_parser("find-saes", DESCRIPTION, (FindSAEsArguments,)), arguments)

    from huggingface_hub.utils import disable_progress_bars

    from hf_msae.hub import find_saes

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    disable_progress_bars()
    found = find_saes(args.model, max_repos=args.max_repos)
    if args.json:
        print(json.dumps({"base_model": args.model, "saes": [sae.to_dict() for sae in found]}, indent=2))
        return
    if not found:
        print(f"No SAE of {args.model} was found on the Hub; `hf-msae train --model {args.model}` trains one.")
        return
    for repo, saes in groupby(found, key=lambda sae: sae.repo):
        print("\n".join(describe_repo(repo, list(saes))))


def describe_repo(repo: str, saes: Sequence["FoundSAE"]) -> list[str]:
    """Lines that say what a repo holds: one for SAEs of a width and nesting, each with the command for its first."""
    kinds: dict[tuple[str, int | None, tuple[int, ...], bool], list[FoundSAE]] = {}
    for sae in saes:
        kinds.setdefault((sae.library, sae.num_latents, tuple(sae.prefix_sizes or ()), sae.loads), []).append(sae)
    lines = [f"{repo}: {len(saes):,} SAE{'' if len(saes) == 1 else 's'}"]
    for (library, num_latents, sizes, loads), alike in kinds.items():
        width = "an unrecorded width" if num_latents is None else f"{num_latents:,} latents"
        lines.append(f"  {library}: {_sites(alike)}; {width}, {_nesting(sizes)}")
        lines.append(f"    {alike[0].command if loads else f'does not load as it stands: {alike[0].note}'}")
    return lines


def _nesting(sizes: Sequence[int]) -> str:
    if len(sizes) > 1:
        return f"nested at {', '.join(map(str, sizes))}"
    return "one level" if sizes else "nesting not recorded"


def _sites(saes: Sequence["FoundSAE"]) -> str:
    """The places, those that differ by their layer alone as a range."""
    forms: dict[str, list[int]] = {}
    for site, site_out in dict.fromkeys((sae.site, sae.site_out) for sae in saes):
        place = " → ".join(filter(None, (site, site_out))) or "an unrecorded site"
        layer = re.search(r"\d+", place)
        form = place if layer is None else re.sub(rf"\b{layer[0]}\b", "{}", place)
        forms.setdefault(form, []).extend([] if layer is None else [int(layer[0])])
    shown = [form.replace("{}", _ranges(sorted(layers))) for form, layers in forms.items()]
    more = f" and {len(shown) - SITES_SHOWN} more sites" if len(shown) > SITES_SHOWN else ""
    return ", ".join(shown[:SITES_SHOWN]) + more


def _ranges(layers: Sequence[int]) -> str:
    """Numbers as people write them: 0–25, or 3,7,12."""
    whole = len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}–{layers[-1]}" if whole else ",".join(map(str, layers))
