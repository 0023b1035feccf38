"""`hf-msae space`: the Gradio page on this machine, or as a Space on the Hub."""

from dataclasses import dataclass, field
from typing import Literal

from hf_msae.cli.parser import build_parser, by_place, parse
from hf_msae.errors import InputError

DESCRIPTION = """\
`space run SAE` shows an SAE in the browser: steer with its latents, explore texts, walk its tree, compare levels.
`space push REPO SAE` publishes the same page as a Space on the Hub, for SAEs that are there."""


@dataclass
class SpaceArguments:
    """What is shown, and where."""

    _argument_group_name = "space"
    _positional = ("action", "names")

    action: Literal["run", "push"] = field(metadata={"help": "Show it on this machine, or publish it."})
    names: list[str] = field(
        default_factory=list,
        metadata={
            "help": "SAEs to choose from, Hub repos or (with run) folders; the first opens. With push, the Space's "
            "name, owner/name, stands before them."
        },
    )
    meta_sae: str | None = field(default=None, metadata={"help": "A meta-SAE of the first one, for the Compare tab."})
    title: str = field(default="Matryoshka SAE", metadata={"help": "Title of the page."})
    private: bool = field(default=False, metadata={"help": "With push: make a new Space private."})
    port: int | None = field(default=None, metadata={"help": "With run: the port. Default: the first free from 7860."})


def run(arguments: list[str]) -> None:
    """Parse, then show or publish."""
    (args,) = parse(build_parser("space", DESCRIPTION, (SpaceArguments,)), by_place("space", arguments))

    from hf_msae.hub.spaces import push_space, run_space

    if args.action == "run":
        if not args.names:
            raise InputError("`space run` needs the SAE to show, a folder or a Hub repo. (`hf-msae demo` needs none.)")
        run_space(args.names, title=args.title, meta_sae=args.meta_sae, port=args.port)
        return
    if len(args.names) < 2:
        raise InputError("`space push` needs the Space's name and an SAE: hf-msae space push OWNER/NAME OWNER/SAE.")
    repo, *saes = args.names
    url = push_space(repo, saes, title=args.title, meta_sae=args.meta_sae, private=args.private)
    print(f"Pushed the Space: {url}")
