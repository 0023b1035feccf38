"""`hf-msae steer`: the same prompt with and without steering, side by side."""

import argparse
import json
import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_msae.cli import common_fields
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.parser import build_parser, by_place, parse, parse_float

if TYPE_CHECKING:
    from hf_msae.steering import Gate, LatentEdit, SteeredPipeline, Steering
    from hf_msae.steering.edits import Edit, Units

DESCRIPTION = """\
Continue a prompt as the language model would, and steered by latents of an SAE, with the same randomness. Without
--latent, --towards and --level, the steering saved beside the SAE (steering.json) is used."""

# Of a word's latent, in --units. Text stays fluent at this strength more often than not.
DEFAULT_VALUE = "1"


@dataclass
class SteerArguments:
    """What is steered, and what is written."""

    _argument_group_name = "steer"
    _positional = ("sae",)

    sae: str = field(metadata={"help": common_fields.SAE_HELP})
    prompt: list[str] = field(metadata={"help": "One or more texts to continue."})
    subfolder: str = common_fields.subfolder()
    model: str | None = common_fields.language_model()
    quantization: Literal["none", "4bit", "8bit"] | None = common_fields.quantization()
    trust_remote_code: bool = common_fields.trust_remote_code()
    latent: list[str] = field(
        default_factory=list,
        metadata={"help": "INDEX=VALUE or INDEX=ablate, such as 12=4 40=ablate."},
    )
    towards: list[str] = field(
        default_factory=list,
        metadata={
            "help": "WORD or WORD=VALUE: VALUE times the steering of this name beside the SAE (`hf-msae find`); where "
            "there is none, the latent that promotes this word most, found in the SAE's interpretation.",
        },
    )
    level: int | None = field(
        default=None, metadata={"help": "Keep only what this level of latents, counted from 0, writes."}
    )
    steering: str | None = field(default=None, metadata={"help": "The name of a steering saved beside the SAE."})
    method: Literal["add", "clamp", "scale"] = field(default="add", metadata={"help": "What a VALUE does."})
    units: Literal["max", "absolute", "norm"] = field(
        default="max",
        metadata={
            "help": "Of VALUE: the latent's largest activation in training, its activation, or the length of the "
            "token's activation."
        },
    )
    positions: Literal["all", "prompt", "generated"] = field(default="all", metadata={"help": "Tokens to steer."})
    when: list[str] = field(
        default_factory=list,
        metadata={
            "help": "INDEX or INDEX=SHARE: steer only tokens on which this latent is active, or above this share of "
            "its largest activation in training; of several, all must be."
        },
    )
    when_after: list[str] = field(
        default_factory=list, metadata={"help": "The same, for the tokens behind one on which the latent is active."}
    )
    max_new_tokens: int = field(default=60, metadata={"help": "Tokens to write."})
    temperature: float = field(default=0.7, metadata={"help": "Of the sampling; 0 is greedy."})
    use_cpu: bool = common_fields.use_cpu()
    seed: int = field(default=0, metadata={"help": "Fixes the randomness of both texts."})
    json: bool = common_fields.as_json()


def run(arguments: list[str], brief: bool = False) -> None:
    """Parse, load, write both texts; these are all that it prints, `brief` or not."""
    (args,) = parse(build_parser("steer", DESCRIPTION, (SteerArguments,)), by_place("steer", arguments))

    from hf_msae.cli.sources import check_sae_place, choose_device, load_language_model
    from hf_msae.language_models import model_to_load
    from hf_msae.quantization import quantization_to_load
    from hf_msae.steering import SteeredPipeline
    from hf_msae.steering.edits import check_edits
    from hf_msae.steering.saved import load_saes_of

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    choose_device(args.use_cpu)
    check_sae_place(args.sae)
    steering = read_steering(args)
    saes = load_saes_of(steering, args.sae, subfolder=args.subfolder)
    for name, sae in saes.items():
        check_edits(sae, [edit for edit in steering.edits if edit.sae == name], name)
    config = next(iter(saes.values())).config
    model_name, revision = model_to_load(config, args.sae, args.model)
    source = SourceArguments(model=model_name, model_revision=revision, trust_remote_code=args.trust_remote_code)
    source.quantization = args.quantization or (None if args.model else quantization_to_load(config))  # type: ignore[assignment]
    model, tokenizer = load_language_model(source)
    show(SteeredPipeline(model, tokenizer, saes, steering), args)


def read_steering(args: SteerArguments) -> "Steering":
    """The steering that the flags describe, or the one saved beside the SAE."""
    from hf_msae.modeling import MatryoshkaSAE
    from hf_msae.modeling.untrusted import inside
    from hf_msae.steering import PrefixEdit, Steering, SteeringError, load_steering
    from hf_msae.steering.saved import STEERING_NAME

    gates = [*(read_gate(text, "here") for text in args.when), *(read_gate(text, "after") for text in args.when_after)]
    latents = [read_latent(text, args.method, args.units) for text in args.latent]
    towards = [edit for text in args.towards for edit in edits_towards(text, args)]
    edits: list[Edit] = [replace(edit, when=gates) for edit in (*latents, *towards)]
    if gates and not edits:
        raise SteeringError("--when and --when-after say where latents are steered; give --latent or --towards, too.")
    if args.level is not None:
        edits.append(PrefixEdit(args.level))
    if edits and args.steering is not None:
        raise SteeringError("--steering names a saved steering; give it, or what to steer, not both.")
    if edits:
        return Steering(edits, args.positions)
    if (
        args.steering is None
        and Path(args.sae).is_dir()
        and not (Path(args.sae) / inside(args.subfolder) / STEERING_NAME).is_file()
    ):
        MatryoshkaSAE.from_pretrained(args.sae, subfolder=args.subfolder)  # or says what is there
        raise SteeringError(
            f"nothing to steer: give --latent INDEX=VALUE, --towards WORD or --level N. ({args.sae} has no saved "
            "steering.)"
        )
    return load_steering(args.sae, args.steering, subfolder=args.subfolder)


def edits_towards(text: str, args: SteerArguments) -> "list[LatentEdit]":
    """`owls` or `owls=2`: what `hf-msae find` saved under this name, or the latent that promotes the word most.

    Raises SteeringError where the SAE has neither such a steering nor an interpretation, or no latent promotes it.
    """
    from hf_msae.interpret import Interpretation, InterpretationError, search_promoting
    from hf_msae.steering import SteeringError

    word, _, value = text.partition("=")
    saved = saved_edits(word, value or DEFAULT_VALUE, args)
    if saved:
        return saved
    try:
        pages = Interpretation.load(args.sae, subfolder=args.subfolder or None)
    except InterpretationError as error:
        raise SteeringError(
            f"--towards {text}: no steering {word!r} is saved beside the SAE, and there is no interpretation to look "
            f"the word up in: run `hf-msae find {args.sae} --name {word}` with examples, or `hf-msae interpret "
            f"{args.sae}`, or give --latent. ({error})"
        ) from error
    hits = search_promoting(word, pages, most=1)
    if not hits:
        raise SteeringError(
            f"--towards {text}: no latent of {args.sae} promotes {word!r}; try another word, or find one by examples: "
            f"`hf-msae find {args.sae} --name {word}`."
        )
    latent = hits[0].latent
    promoted = ", ".join(effect.token.strip() for effect in pages.page(latent).promoted[:5])
    _say(f"{word}: latent {latent}, which promotes {promoted}", args)
    return [read_latent(f"{latent}={value or DEFAULT_VALUE}", args.method, args.units)]


def saved_edits(name: str, value: str, args: SteerArguments) -> "list[LatentEdit]":
    """The edits of the steering of this name, `value` times as strong; none where no steering that adds has it."""
    from hf_msae.modeling.untrusted import inside
    from hf_msae.steering import LatentEdit, SteeringError, load_steerings
    from hf_msae.steering.saved import STEERING_NAME

    is_folder = Path(args.sae).is_dir()
    if is_folder and not (Path(args.sae) / inside(args.subfolder) / STEERING_NAME).is_file():
        return []
    try:
        found = load_steerings(args.sae, subfolder=args.subfolder).get(name)
    except SteeringError:
        if is_folder:
            raise  # the file is damaged
        return []
    edits = [] if found is None else [edit for edit in found.edits if isinstance(edit, LatentEdit)]
    if found is None or len(edits) < len(found.edits) or any(edit.method != "add" or edit.when for edit in edits):
        return []
    try:
        strength = parse_float(value)
    except argparse.ArgumentTypeError as error:
        raise SteeringError(f"--towards {name}={value}: expected WORD or WORD=VALUE, such as owls=2.") from error
    _say(f"{name}: the saved steering, latents {', '.join(str(edit.latent) for edit in edits)}", args)
    return [replace(edit, value=strength * edit.value) for edit in edits]


def _say(text: str, args: SteerArguments) -> None:
    print(text, file=sys.stderr if args.json else sys.stdout)


def read_latent(text: str, method: Literal["add", "clamp", "scale"], units: "Units") -> "LatentEdit":
    """`12=4` or `40=ablate`. Raises SteeringError for anything else."""
    from hf_msae.steering import LatentEdit, SteeringError

    index, _, value = text.partition("=")
    try:
        if value == "ablate":
            return LatentEdit(int(index), method="ablate")
        return LatentEdit(int(index), parse_float(value), method, units)
    except SteeringError:
        raise
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise SteeringError(f"--latent {text}: expected INDEX=VALUE or INDEX=ablate, such as 12=4.") from error


def read_gate(text: str, then: Literal["here", "after"]) -> "Gate":
    """`40` or `40=0.5`. Raises SteeringError for anything else."""
    from hf_msae.steering import Gate, SteeringError

    index, _, share = text.partition("=")
    try:
        return Gate(int(index), parse_float(share) if share else 0.0, then=then)
    except SteeringError:
        raise
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise SteeringError(
            f"--when{'' if then == 'here' else '-after'} {text}: expected INDEX or INDEX=SHARE, such as 40=0.5."
        ) from error


def show(pipeline: "SteeredPipeline", args: SteerArguments) -> None:
    """Both continuations of each prompt, next to each other."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hf_msae.steering import Steering

    console = Console(highlight=False)
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    pipes = (pipeline.with_steering(Steering()), pipeline)
    written = [[pipe(prompt, **options)[0]["generated_text"] for pipe in pipes] for prompt in args.prompt]
    if args.json:
        rows = [
            {"prompt": prompt, "default": default, "steered": steered}
            for prompt, (default, steered) in zip(args.prompt, written, strict=True)
        ]
        print(json.dumps({"texts": rows}))
        return
    for prompt, texts in zip(args.prompt, written, strict=True):
        table = Table(expand=True)
        table.add_column("default", ratio=1)
        table.add_column("steered", ratio=1)
        table.add_row(*(Text.assemble((text[: len(prompt)], "bold"), text[len(prompt) :]) for text in texts))
        console.print(table)
