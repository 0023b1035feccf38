"""`hf-msae pull`: SAEs from the Hub as a folder."""

import logging
from dataclasses import dataclass, field

from hf_msae.cli.parser import build_parser, parse

DESCRIPTION = """\
Fetch the SAEs of a repo into a folder from which they load like any other. With --prefix, only the first latents of
each are fetched. The folder appears when everything is there."""


@dataclass
class PullArguments:
    """What is fetched."""

    _argument_group_name = "pull"
    _positional = ("repo", "dir")

    repo: str = field(metadata={"help": "The repo on the Hub, owner/name."})
    dir: str | None = field(default=None, metadata={"help": "The folder to make. Default: the repo's name."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit."})
    subfolder: str | None = field(default=None, metadata={"help": "Only the SAE in this folder of the repo."})
    sites: list[str] = field(
        default_factory=list,
        metadata={"help": "Only the SAEs at these sites, such as layers.12."},
    )
    prefix: int | None = field(default=None, metadata={"help": "Only the first latents of each."})


def run(arguments: list[str]) -> None:
    """Parse, fetch, say what."""
    (args,) = parse(build_parser("pull", DESCRIPTION, (PullArguments,)), arguments)

    from hf_msae.hub import pull

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    folder = args.dir or args.repo.rstrip("/").split("/")[-1]
    fetched = pull(
        args.repo,
        folder,
        subfolder=args.subfolder,
        sites=args.sites or None,
        prefix=args.prefix,
        revision=args.revision,
    )
    for sae in fetched:
        latents = f"{sae.num_latents:,} of {sae.entry.num_latents:,} latents" if args.prefix else "all latents"
        print(
            f"{sae.folder}: {latents} of {'/'.join(filter(None, (args.repo, sae.entry.subfolder)))} at "
            f"{sae.entry.site}, {sae.num_bytes / 1e6:,.1f} of {sae.num_bytes_on_hub / 1e6:,.1f} MB"
        )
