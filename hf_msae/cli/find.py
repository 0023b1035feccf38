"""`hf-msae find`: latents of a concept that is given by examples, and a steering by a few of them."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hf_msae.cli import common_fields
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.parser import build_parser, parse
from hf_msae.cli.terminal import print_table
from hf_msae.errors import InputError

if TYPE_CHECKING:
    from hf_msae.concepts import Finding, FoundRow

DESCRIPTION = """\
Find the latents of SAE (a folder or a Hub repo) for a concept that texts with it and texts without it show: which tell
it, and which make the language model say it when they are pushed, beside DiffMean, a probe and random latents. A
steering of one to five latents is saved beside the SAE, for `hf-msae steer SAE --steering NAME`."""

# Latents in the table, of those that were pushed.
NUM_SHOWN = 6


@dataclass
class FindArguments:
    """What is looked for, and what it may cost."""

    _argument_group_name = "find"
    _positional = ("sae",)

    sae: str = field(metadata={"help": common_fields.SAE_HELP})
    positive: str = field(
        metadata={"help": "Texts with the concept, 10 or more: a .txt, .jsonl or .parquet file, or a Hub dataset."}
    )
    negative: str = field(metadata={"help": "Texts without it, as much like the others as can be had otherwise."})
    neutral: str | None = field(
        default=None, metadata={"help": "Texts on which pushes are tried. Default: the negative ones."}
    )
    words: list[str] = field(
        default_factory=list,
        metadata={"help": "What the model should say. Default: the tokens typical of the positive texts."},
    )
    name: str = field(default="found", metadata={"help": "Of the steering; one of this name is replaced."})
    save: bool = field(default=True, metadata={"help": "Save the steering beside the SAE."})
    subfolder: str = common_fields.subfolder()
    model: str | None = common_fields.language_model()
    trust_remote_code: bool = common_fields.trust_remote_code()
    site: str | None = common_fields.site()
    separator: str | None = field(
        default=None,
        metadata={"help": "What separates texts in .txt files, such as '\\n'. Default: <|endoftext|> or blank lines."},
    )
    text_column: str = field(default="text", metadata={"help": "Column with the text, in other files."})
    max_latents: int = field(default=5, metadata={"help": "In the steering, 1 to 5."})
    loss: float = field(
        default=0.5,
        metadata={
            "help": "What a push costs: how much less likely the unsteered model finds what the steered one says, "
            "in nats per token."
        },
    )
    num_candidates: int = field(default=16, metadata={"help": "Latents that are pushed one by one."})
    neutral_tokens: int = field(default=1000, metadata={"help": "Tokens of text on which pushes are tried."})
    context_length: int | None = field(
        default=None, metadata={"help": "Tokens of a text that are read. Default: the SAE's, 128 at most."}
    )
    lm_batch_size: int = field(default=16, metadata={"help": "Texts per forward pass."})
    use_cpu: bool = common_fields.use_cpu()
    seed: int = field(default=0, metadata={"help": "Of the division of the examples into halves."})
    json: bool = common_fields.as_json()


def run(arguments: list[str]) -> None:
    """Parse, load, find, save, print."""
    (args,) = parse(build_parser("find", DESCRIPTION, (FindArguments,)), arguments)

    from hf_msae.cli.sources import (
        check_sae_place,
        choose_device,
        complete_model,
        load_language_model,
        load_sae,
        load_text_files,
    )
    from hf_msae.concepts import find_latents
    from hf_msae.steering import save_steering

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    choose_device(args.use_cpu)
    check_sae_place(args.sae)
    folder = _folder_to_save(args)
    positive, negative, neutral = (
        None if place is None else load_text_files(place, args.separator, args.text_column)
        for place in (args.positive, args.negative, args.neutral)
    )
    source = SourceArguments(model=args.model or "", trust_remote_code=args.trust_remote_code)
    sae = load_sae(args.sae, args.subfolder, source)
    complete_model(source, sae.config, args.sae)
    model, tokenizer = load_language_model(source)
    found = find_latents(
        model,
        tokenizer,
        sae,
        positive,
        negative,
        neutral=neutral,
        words=args.words,
        name=args.name,
        max_latents=args.max_latents,
        loss=args.loss,
        num_candidates=args.num_candidates,
        neutral_tokens=args.neutral_tokens,
        context_length=args.context_length,
        site=args.site,
        lm_batch_size=args.lm_batch_size,
        seed=args.seed,
    )
    if folder is not None:
        save_steering(found.steering, folder)
    if args.json:
        print(json.dumps({**found.to_dict(), "saved": None if folder is None else str(folder)}))
        return
    _show(found)
    if folder is not None:
        print(f"Saved the steering {found.steering.name!r} to {folder}")
        print(f"Next: hf-msae steer {args.sae} --steering {found.steering.name} --prompt TEXT")


def _folder_to_save(args: FindArguments) -> Path | None:
    """Where the steering is saved; None where it is not. Raises InputError for a Hub repo."""
    from hf_msae.modeling.untrusted import inside

    if not args.save:
        return None
    if not Path(args.sae).is_dir():
        raise InputError(
            f"{args.sae} is a Hub repo, beside which nothing can be saved from here: fetch it with `hf-msae pull` and "
            "name the folder, or give --no-save."
        )
    return Path(args.sae) / inside(args.subfolder)


def _show(found: "Finding") -> None:
    from rich.console import Console

    console = Console(highlight=False)
    facts = found.facts
    console.print(
        f"{facts['positive']:,} positive and {facts['negative']:,} negative examples, half of them held out. Typical "
        f"tokens: {', '.join(token.strip() or repr(token) for token in found.tokens[:12])}",
        markup=False,
    )
    levels = [
        (
            f"{level.prefix:,}",
            str(level.latent),
            f"{level.auroc:.2f}",
            ", ".join(map(str, level.few)),
            f"{level.few_auroc:.2f}",
        )
        for level in found.levels
    ]
    print_table(
        console,
        "How well each level tells the concept (AUROC on held-out examples)",
        ("prefix", "latent", "AUROC", "few latents", "AUROC of few"),
        levels,
    )
    print_table(
        console,
        f"What a push makes the model say, where the typical tokens have a probability of {found.at_rest:.4f}",
        ("", "level", "tells (AUROC)", "says", "loss", "KL"),
        [_cells(row) for row in (*found.rows, *found.latents[:NUM_SHOWN])],
    )


def _cells(row: "FoundRow") -> list[str]:
    name = row.name
    if row.latents and not name.startswith("latent "):
        name += f" ({', '.join(map(str, row.latents))})"
    return [
        name,
        "–" if row.level is None else str(row.level),
        "–" if row.auroc is None else f"{row.auroc:.2f}",
        f"{row.effect.said:.4f}",
        f"{row.effect.loss:.2f}",
        f"{row.effect.kl:.2f}",
    ]
