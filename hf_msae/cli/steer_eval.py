"""`hf-msae steer-eval`: how well steerings bring concepts into texts, and what that costs, beside controls."""

import json
import logging
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from hf_msae.cli import common_fields
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.parser import build_parser, parse
from hf_msae.cli.terminal import print_table
from hf_msae.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_msae.concepts.results import SteeringEvaluation
    from hf_msae.concepts.scorers import Scorer

DESCRIPTION = """\
For each concept of a file, find a steering of a few latents of SAE (a folder or a Hub repo) as `hf-msae find` does,
continue prompts with it and with controls at several strengths, and measure concept, fluency and instruction. The
strength is chosen on every other prompt and reported on the rest. Writes evaluation.json and report.html, after each
concept; a folder that has an evaluation with these settings is gone on with."""

# Words of a text that are its beginning, where prompts are taken from the dataset.
PROMPT_WORDS = 6
# Texts of the dataset in which examples of words are looked for.
MAX_TEXTS = 5000


@dataclass
class SteerEvalArguments:
    """What is steered towards, and what is tried."""

    _argument_group_name = "steer-eval"
    _positional = ("sae",)

    sae: str = field(metadata={"help": common_fields.SAE_HELP})
    concepts: str = field(
        metadata={
            "help": "A .jsonl or .parquet file: rows with a name and words, or with positive and negative texts, or "
            "rows of AxBench's sets."
        }
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the report. Default: none is written."})
    prompts: str | None = field(
        default=None,
        metadata={"help": "A text file with a prompt a line. Default: beginnings of texts of the dataset."},
    )
    num_prompts: int = field(default=16, metadata={"help": "How many prompts, the first ones."})
    chat: bool = field(default=False, metadata={"help": "Prompts are messages to a chat model."})
    methods: list[str] = field(default_factory=list, metadata={"help": "What is tried. Default: all that there is."})
    strengths: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 1.0, 1.5, 2.0],
        metadata={"help": "In units of the shift that costs --loss."},
    )
    loss: float = field(
        default=0.5, metadata={"help": "Of a shift at strength 1 on neutral text, in nats per token, as in find."}
    )
    max_new_tokens: int = field(default=40, metadata={"help": "Tokens to write."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; 0 is greedy."})
    judge_model: str | None = field(
        default=None, metadata={"help": "A chat model that scores texts, instead of words: a Hub id or a folder."}
    )
    judge_url: str | None = field(
        default=None, metadata={"help": "An OpenAI-compatible endpoint; --judge-model is then the model's name there."}
    )
    neutral_tokens: int = field(default=1000, metadata={"help": "Tokens of text on which shifts are tried."})
    subfolder: str = common_fields.subfolder()
    use_cpu: bool = common_fields.use_cpu()
    seed: int = field(default=0, metadata={"help": "Of all that is random."})
    json: bool = common_fields.as_json()


def run(arguments: list[str]) -> None:
    """Parse, load, measure, write, print."""
    args, sources = parse(build_parser("steer-eval", DESCRIPTION, (SteerEvalArguments, SourceArguments)), arguments)

    from hf_msae.cli.sources import choose_device, load_language_model, load_sae, load_text
    from hf_msae.concepts import METHODS, evaluate_steering, read_concepts, write_steering_report
    from hf_msae.concepts.steer_report import read_steering_report

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    choose_device(args.use_cpu)
    sae = load_sae(args.sae, args.subfolder, sources)
    documents, _ = load_text(sources)
    texts = [text for text in islice(documents, MAX_TEXTS) if isinstance(text, str)]
    prompts = read_prompts(args, texts)
    concepts = read_concepts(args.concepts, texts, load_scorer(args))
    model, tokenizer = load_language_model(sources)

    def write(so_far: "SteeringEvaluation") -> None:
        if args.output_dir is not None:
            write_steering_report(so_far, args.output_dir, f"Steering by {args.sae}")

    judged = {"judge": args.judge_model, "at": args.judge_url} if args.judge_model else {}
    found = evaluate_steering(
        model,
        tokenizer,
        sae,
        concepts,
        prompts,
        methods=args.methods or METHODS,
        strengths=args.strengths,
        loss=args.loss,
        new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        chat=args.chat,
        seed=args.seed,
        of=json.dumps({"sae": args.sae, "subfolder": args.subfolder, "model": model.name_or_path, **judged}),
        done=None if args.output_dir is None else read_steering_report(args.output_dir),
        on_concept=write,
        neutral_tokens=args.neutral_tokens,
    )
    if args.json:
        print(json.dumps(found.to_dict()))
        return
    from rich.console import Console

    from hf_msae.concepts.steer_report import steering_tables

    console = Console(highlight=False)
    for table in steering_tables(found):
        print_table(console, table.title, table.header, table.rows, table.note)
    for name, why in found.skipped.items():
        console.print(f"{name} is left out: {why}", markup=False)
    if args.output_dir is not None:
        print(f"Wrote {Path(args.output_dir) / 'report.html'}")


def read_prompts(args: SteerEvalArguments, texts: list[str]) -> list[str]:
    """The prompts of the file, or beginnings of texts."""
    if args.prompts is None:
        found = [" ".join(text.split()[:PROMPT_WORDS]) for text in texts]
    else:
        path = Path(args.prompts)
        if not path.is_file():
            raise InputError(f"--prompts {path} is no file; give one with a prompt a line.")
        found = path.read_text(encoding="utf-8").splitlines()
    found = list(dict.fromkeys(prompt.strip() for prompt in found if prompt.strip()))[: args.num_prompts]
    if len(found) < 2:
        raise InputError(f"Strengths are chosen on every other prompt, so two different ones are needed; got {found}.")
    return found


def load_scorer(args: SteerEvalArguments) -> "Callable[[str], Scorer] | None":
    """What makes a concept's scorer from its name; None for words."""
    from hf_msae import language_models
    from hf_msae.concepts import JudgeScorer, endpoint_judge, model_judge

    if args.judge_model is None:
        if args.judge_url is not None:
            raise InputError("--judge-url needs --judge-model, the model's name there.")
        return None
    if args.judge_url is not None:
        judge = endpoint_judge(args.judge_url, args.judge_model)
    else:
        judge = model_judge(*language_models.load_language_model(args.judge_model, needs_head=True))
    return lambda name: JudgeScorer(judge, name)
