"""`hf-msae push`: what a training run left, on the Hub."""

import logging
from dataclasses import dataclass, field

from hf_msae.cli.parser import build_parser, parse

DESCRIPTION = """\
Publish a folder that `hf-msae train`, `hf-msae convert` or save_pretrained left: one SAE, or a grid, each of whose
SAEs gets its folder in the repo. A model card is written, or brought up to date: what you wrote into it stays.
Everything is one commit; checkpoints stay at home."""


@dataclass
class PushArguments:
    """What goes where."""

    _argument_group_name = "push"
    _positional = ("dir", "repo")

    dir: str = field(metadata={"help": "The folder to publish."})
    repo: str = field(metadata={"help": "The repo on the Hub, owner/name; made if it is not there."})
    subfolder: str | None = field(
        default=None, metadata={"help": "Where in the repo. Default: its root, or for a grid a folder for each SAE."}
    )
    private: bool = field(default=False, metadata={"help": "Make a new repo private, and refuse a public one."})
    revision: str | None = field(default=None, metadata={"help": "The branch, made if it is not there."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of committing."})
    commit_message: str | None = field(default=None, metadata={"help": "The title of the commit."})


def run(arguments: list[str]) -> None:
    """Parse, push, say where."""
    (args,) = parse(build_parser("push", DESCRIPTION, (PushArguments,)), arguments)

    from hf_msae.hub import push_folder

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    url = push_folder(
        args.dir,
        args.repo,
        subfolder=args.subfolder,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.commit_message,
    )
    print(f"Pushed {args.dir}: {url}")
