"""`hf-msae push`: what a training run left, on the Hub."""

import logging
from dataclasses import dataclass, field

from hf_msae.cli.parser import build_parser, parse
from hf_msae.errors import InputError

DESCRIPTION = """\
Publish a folder that `hf-msae train`, `hf-msae convert` or save_pretrained left: one SAE, or a grid, each of whose
SAEs gets its folder in the repo. What `hf-msae cache-activations` or `hf-msae encode` left goes to a data set. A card
is written, or brought up to date: what you wrote into it stays. Everything is one commit; checkpoints stay at home."""


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

    from hf_msae.corpora import EncodedLatents
    from hf_msae.corpora.encoded_files import is_encoded
    from hf_msae.data import is_activation_cache
    from hf_msae.hub import push_folder
    from hf_msae.shared_caches import push_activation_cache

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if is_activation_cache(args.dir) or is_encoded(args.dir):
        _check_flags_of_data(args)
        private = args.private or None
        if is_activation_cache(args.dir):
            url = push_activation_cache(args.dir, args.repo, private=private)
        else:
            url = EncodedLatents(args.dir).push(args.repo, private=private)
        print(f"Pushed {args.dir}: {url}")
        return
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


def _check_flags_of_data(args: PushArguments) -> None:
    """Raises InputError for what only a push of SAEs does."""
    asked = [name for name in ("subfolder", "revision", "create_pr", "commit_message") if getattr(args, name)]
    if asked:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise InputError(f"{args.dir} is pushed as a data set, in one commit to its main branch; leave out {flags}.")
