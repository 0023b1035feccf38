"""`hf-msae COMMAND`: finds the command, and turns what a user can mend into one line instead of a traceback."""

import importlib
import importlib.metadata
import os
import select
import sys
import traceback
from collections.abc import Sequence

from hf_msae.errors import HfMsaeError

# Name, module that has a `run(argv)`, and what it is for. A module is imported when it is called.
COMMANDS = {
    "quickstart": ("hf_msae.cli.quickstart", "train, read and steer a small SAE of the story model in a few minutes"),
    "train": ("hf_msae.cli.train", "train one SAE or a grid of them on a language model's activations"),
    "steer": ("hf_msae.cli.steer", "continue a prompt as it would be and steered by latents, side by side"),
    "find": ("hf_msae.cli.find", "find the latents of a concept by texts with it and without it, and a steering"),
    "steer-eval": ("hf_msae.cli.steer_eval", "measure how well steerings bring concepts into texts, beside controls"),
    "serve": ("hf_msae.cli.serve", "serve a language model to OpenAI's clients, each request steered its own way"),
    "export-steering": ("hf_msae.cli.export_steering", "write a saved steering as a model, or for another program"),
    "meta": ("hf_msae.cli.meta", "what latents are made of: a meta-SAE on an SAE's decoder rows, and its browser"),
    "eval": ("hf_msae.cli.eval", "measure an SAE at every prefix, beside baselines, and write a report"),
    "toy": ("hf_msae.cli.toy", "train where the truth is known, and see what each variant does to a hierarchy"),
    "interpret": ("hf_msae.cli.interpret", "make a page for every latent: contexts, effects on the output, labels"),
    "encode": ("hf_msae.cli.encode", "write which latents are active on each token or document of some text"),
    "diff": ("hf_msae.cli.diff", "compare two corpora by latents: what one has more of, how much, and where"),
    "neuronpedia": ("hf_msae.cli.neuronpedia", "write an interpretation in the form that Neuronpedia imports"),
    "tree": ("hf_msae.cli.tree", "print the hierarchy between an SAE's levels, or write it as JSON or Graphviz"),
    "demo": ("hf_msae.cli.demo", "look inside an SAE of the story model in the browser, and steer with it"),
    "space": ("hf_msae.cli.space", "the same for an SAE of yours, on this machine or as a Space on the Hub"),
    "find-saes": ("hf_msae.cli.find_saes", "list the SAEs of a language model on the Hub, and how each is loaded"),
    "push": ("hf_msae.cli.push", "publish an SAE or a grid on the Hub, with a model card"),
    "pull": ("hf_msae.cli.pull", "fetch SAEs from the Hub into a folder, whole or only their first latents"),
    "convert": ("hf_msae.cli.convert", "read another library's checkpoint, or write one for it"),
    "cache-activations": ("hf_msae.cli.cache_activations", "write activations to disk, to train on many times"),
}

# As shells say it of a program that writes into a pipe that nobody reads: 128 and SIGPIPE.
READER_LEFT = 141

OVERVIEW = """\
hf-msae: Matryoshka sparse autoencoders for any Hugging Face language model

usage: hf-msae COMMAND [options]        hf-msae COMMAND --help

{commands}

Without --model and --dataset, commands use the story world that ships with the package, and need no network.

examples:
  hf-msae quickstart
  hf-msae train --model google/gemma-2-2b --dataset monology/pile-uncopyrighted --site layers.12 \\
      --num-latents 65536 --k 40 --max-tokens 500M --output-dir runs/gemma
  accelerate launch -m hf_msae.cli train --config run.yaml
"""


def overview() -> str:
    """The text of `hf-msae --help`."""
    width = max(map(len, COMMANDS))
    return OVERVIEW.format(commands="\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()))


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit.

    0 is success, 2 input that cannot be used, 130 the end after Ctrl-C, 141 that of whoever reads what is printed (`|
    head`), 143 that after SIGTERM, 1 anything else.

    Args:
        argv: The arguments. Default: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    status: str | int | None
    try:
        status = _answer(arguments, debug)
    except SystemExit as ended:  # a parser that has printed its help
        status = ended.code
    except BrokenPipeError:
        if not _reader_left():
            raise
        status = READER_LEFT
    # Asked here, because Python's own flush at the end could only complain.
    sys.exit(READER_LEFT if _reader_left() else status)


def _answer(arguments: list[str], debug: bool) -> int:
    """Do what the arguments say, and return the status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(importlib.metadata.version("hf-msae"))
        return 0
    if arguments[0] not in COMMANDS:
        print(f"hf-msae: there is no command {arguments[0]!r}\n\n{overview()}", file=sys.stderr)
        return 2
    return _run(arguments[0], arguments[1:], debug)


def _reader_left() -> bool:
    """Whether nobody reads what is printed any more; what is still printed then goes nowhere."""
    try:
        sys.stdout.flush()
        # Where each piece was written at once, nothing is left that could fail, but the system knows.
        to_the_system = os.name != "nt" and sys.stdout is sys.__stdout__
        left = to_the_system and _is_broken(sys.stdout.fileno())
    except BrokenPipeError:
        left = True
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def _is_broken(pipe: int) -> bool:
    asked = select.poll()
    asked.register(pipe, 0)
    return any(happened & select.POLLERR for _, happened in asked.poll(0))


def _run(command: str, arguments: list[str], debug: bool) -> int:
    try:
        importlib.import_module(COMMANDS[command][0]).run(arguments)
    except KeyboardInterrupt:
        print("hf-msae: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return READER_LEFT
        words = in_words(error)
        if debug or words is None:
            traceback.print_exc()
        if words is None:
            return 1
        hint = "" if debug else "\n(--debug shows where this came from)"
        print(f"hf-msae {command}: {words}{hint}", file=sys.stderr)
        return error.exit_code if isinstance(error, HfMsaeError) else 2
    return 0


def in_words(error: Exception) -> str | None:
    """What a user can do about an error: our own words, the Hub's, or the system's about a file that was named.

    None for any other error, also for a ValueError that nobody expected: it is a fault of this package, and its
    traceback is what a report needs.
    """
    if isinstance(error, HfMsaeError):
        return str(error)  # before anything heavy is imported: a mistyped flag is answered at once
    from huggingface_hub.errors import HFValidationError, StrictDataclassError
    from huggingface_hub.utils import httpx

    from hf_msae.modeling.untrusted import SAEError

    if isinstance(error, StrictDataclassError):
        return str(error.__cause__ or error)  # a configuration's own words; around them stands which validator raised
    if isinstance(error, httpx.TransportError):
        return f"the Hub cannot be reached ({error}). Check the network, or the name if it is meant as a folder."
    # Without a number of the system's, an OSError holds a sentence of transformers or of the Hub about what it lacks.
    of_files = isinstance(error, OSError) and (error.errno is None or error.filename is not None)
    known = of_files or isinstance(error, (SAEError, HFValidationError))
    return str(error) if known else None
