"""`hf-msae quickstart`: the whole path on the story model, command by command, as a user would type them.

Each command is announced in a line, shown, and prints its result, without what it tells those who run it alone.
"""

import importlib
import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hf_msae.cli import common_fields
from hf_msae.cli.parser import build_parser, parse

if TYPE_CHECKING:
    from hf_msae.interpret import Hierarchy

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

# Of the tree that is shown: how deep, and how many children of one latent.
DEPTH, MAX_CHILDREN = 2, 6
# Roots among which the one to show is chosen.
MOST_ROOTS = 20
# On which share of tokens a root that is shown fires at most.
MOST_FIRINGS = 0.05


@dataclass
class QuickstartArguments:
    """Where, and how long."""

    _argument_group_name = "quickstart"

    output_dir: str = field(
        default="runs/quickstart", metadata={"help": "Where it is written. What a run left there is deleted."}
    )
    max_tokens: str = field(default="1.5M", metadata={"help": "Tokens to train on."})
    use_cpu: bool = common_fields.use_cpu()
    interpret_tokens: str = field(default="150k", metadata={"help": "Tokens to read what latents mean from."})


def run(arguments: list[str]) -> None:
    """Parse, then run one command after the other."""
    (args,) = parse(build_parser("quickstart", DESCRIPTION, (QuickstartArguments,)), arguments)
    print("Four steps on the story model that ships with the package, in two to four minutes, without a network.")
    for number, (words, asked) in enumerate(commands(args), 1):
        command = [*asked, "--use-cpu"] if args.use_cpu else asked
        print(f"\n{number} of 4: {words}\n$ hf-msae {shlex.join(command)}", flush=True)
        importlib.import_module(f"hf_msae.cli.{command[0]}").run(command[1:], brief=True)
    print(next_steps(args.output_dir))


def commands(args: QuickstartArguments) -> Iterator[tuple[str, list[str]]]:
    """What each command does, and the command; the last ones are known when the others have run."""
    from hf_msae.interpret import Interpretation, read_hierarchy, search_promoting

    folder = args.output_dir
    train = ["train", *SAE, *HELD_OUT, "--max-tokens", args.max_tokens, "--output-dir", folder]
    words = f"train a dictionary of 1,024 latents on {args.max_tokens} tokens, which takes most of the time"
    yield words, [*train, "--overwrite-output-dir"]
    words = f"read {args.interpret_tokens} tokens for what each latent means, in half a minute"
    yield words, ["interpret", folder, "--max-tokens", args.interpret_tokens]
    found = read_hierarchy(folder)
    root = None if found is None else telling_root(*found)
    tree = ["tree", folder, "--depth", str(DEPTH), "--max-children", str(MAX_CHILDREN)]
    words = "print a tree of concepts: a general latent, and those that refine it, named by what they fire on"
    yield words, tree if root is None else [*tree, "--root", str(root)]
    pages = Interpretation.load(folder)
    words = "turn a latent up, and write a story without and with it, with the same randomness"
    for word, beginning in BEGINNINGS.items():
        if search_promoting(word, pages):
            yield words, ["steer", folder, "--towards", word, "--positions", "prompt", "--prompt", beginning]
            return


def telling_root(hierarchy: "Hierarchy", names: Sequence[str]) -> int | None:
    """The root below which most latents are shown that are not named by function words; None without any root.

    One that fires on few tokens where there is one: what fires on a sixth of all text has a name that says little.

    Args:
        hierarchy: between the levels.
        names: of all latents.
    """
    from hf_msae.interpret.function_words import is_function_word

    direct = hierarchy.reduced()

    def telling(latent: int, depth: int = DEPTH) -> int:
        children = direct.children(latent)[:MAX_CHILDREN] if depth else []
        return sum(1 + telling(edge.child, depth - 1) for edge in children if not function_word(edge.child))

    def function_word(latent: int) -> bool:
        return is_function_word(names[latent].split(", ")[0])

    roots = [root for root in hierarchy.roots(names)[:MOST_ROOTS] if not function_word(root)]
    most = MOST_FIRINGS * hierarchy.num_tokens
    return max([root for root in roots if hierarchy.counts[root] <= most] or roots, key=telling, default=None)


def next_steps(folder: str) -> str:
    """Three commands that follow, as they are to be typed."""
    place = shlex.quote(folder)
    page = f"space run {place}      # the same in the browser: slide, click, compare"
    tree = f"tree {place} --depth 3      # all of the tree"
    return f"""{finding_the_program()}
Next:
  hf-msae {page if importlib.util.find_spec("gradio") else tree}
  hf-msae eval {place}      # every metric at every level, beside baselines, as a report: some minutes
  hf-msae train --model gpt2 --dataset Salesforce/wikitext --dataset-name wikitext-103-raw-v1 --max-tokens 20M \
--output-dir runs/gpt2      # your own model"""


def finding_the_program() -> str:
    """What to type once where the shell does not find `hf-msae`, as after `make`, which uses an environment's own."""
    activate = Path(sys.prefix) / "bin" / "activate"
    if shutil.which("hf-msae") or not activate.is_file():
        return ""
    return f"\nSo that this shell finds hf-msae: source {shlex.quote(os.path.relpath(activate))}"
