"""`hf-msae quickstart`: the whole path on the story model, command by command, as a user would type them."""

import importlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

from hf_msae.cli.parser import build_parser, parse

DESCRIPTION = """\
Train a small Matryoshka SAE on the story model that ships with the package, print its table by level, read what its
latents mean, print the tree of concepts, and steer a story. Two to four minutes on two cores, without a network; every
step is a command of its own, and is shown."""
# Sparser and with a narrower first level than the defaults: a latent then more often stands for one concept.
SAE = ("--num-latents", "1024", "--prefix-sizes", "32", "128", "1024", "--k", "8")
# Half of the defaults, since finding such text is a good part of so short a run.
HELD_OUT = ("--eval-tokens", "50k", "--calibration-tokens", "50k")
# Words to steer towards, and beginnings in which they have a place. Only these are steered, so the rest stays a story.
BEGINNINGS = {
    "angry": "It was a cold day, and Ben was very",
    "owl": "One morning, Mia saw a small",
    "red": "Lily had a new",
    "apples": "On the table stood a box of",
}


@dataclass
class QuickstartArguments:
    """Where, and how long."""

    _argument_group_name = "quickstart"

    output_dir: str = field(
        default="runs/quickstart", metadata={"help": "Where it is written. What a run left there is deleted."}
    )
    max_tokens: str = field(default="1.5M", metadata={"help": "Tokens to train on."})
    interpret_tokens: str = field(default="150k", metadata={"help": "Tokens to read what latents mean from."})


def run(arguments: list[str]) -> None:
    """Parse, then run one command after the other."""
    (args,) = parse(build_parser("quickstart", DESCRIPTION, (QuickstartArguments,)), arguments)
    for command in commands(args):
        print(f"\n$ hf-msae {shlex.join(command)}", flush=True)
        importlib.import_module(f"hf_msae.cli.{command[0]}").run(command[1:])


def commands(args: QuickstartArguments) -> Iterator[list[str]]:
    """The commands; the last one is known when the others have run."""
    from hf_msae.interpret import Interpretation, search_promoting

    folder = args.output_dir
    yield ["train", *SAE, *HELD_OUT, "--max-tokens", args.max_tokens, "--output-dir", folder, "--overwrite-output-dir"]
    yield ["interpret", folder, "--max-tokens", args.interpret_tokens]
    yield ["tree", folder, "--depth", "2", "--max-children", "10"]
    pages = Interpretation.load(folder)
    for word, beginning in BEGINNINGS.items():
        if search_promoting(word, pages):
            yield ["steer", folder, "--towards", word, "--positions", "prompt", "--prompt", beginning]
            return
