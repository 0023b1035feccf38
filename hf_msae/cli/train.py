"""`hf-msae train`: a grid of SAEs from one pass of a language model."""

import json
import logging
import shlex
import sys
from dataclasses import dataclass, field, fields, make_dataclass, replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_msae.cli import common_fields
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.config_fields import read_config_fields
from hf_msae.cli.parser import build_parser, parse
from hf_msae.cli.terminal import print_table
from hf_msae.training.arguments import SAETrainingArguments

if TYPE_CHECKING:
    from hf_msae.metrics import Measurement
    from hf_msae.training import SAETrainer

DESCRIPTION = """\
Train a Matryoshka SAE, or, where --site, --num-latents or --k are given more than once, every combination of them from
one pass of the language model. Numbers may be written 65_536, 2k, 500M, 1/32. Without --model and --dataset: the story
world that ships with the package. With --init-from, an SAE's form is that of the one it begins with, but for what is
given here."""


@dataclass
class GridArguments:
    """What is trained: every combination of the lists."""

    _argument_group_name = "sparse autoencoder"

    site: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Where in the model: layers.12, layers.12.mlp, layers.12.attn, embeddings, "
            "or a module path. Default: the middle layer.",
        },
    )
    site_out: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Train a transcoder, which reads --site and reconstructs this place, such as layers.12.mlp where "
            "--site is layers.12.mlp:input. One for each --site.",
        },
    )
    token_lookup: bool | None = field(
        default=None,
        metadata={
            "help": "Train a tokenized SAE, which adds a learnt vector of the activation's own token to what it "
            "reconstructs, so that latents need not say which token it is.",
        },
    )
    num_latents: list[int] = field(
        default_factory=list,
        metadata={"help": "Size of the dictionary. Default: 16 times the width."},
    )
    k: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Active latents per token. Default: 32, or fewer for a small dictionary.",
        },
    )
    prefix_sizes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Nested sizes, as numbers of latents (2048 8192 65536) or shares (1/16 1/4 1). "
            "Default: 1/16 1/8 1/4 1/2 1.",
        },
    )
    recipe: Literal["prefixes", "balanced", "tree", "reconstruction"] | None = field(
        default=None,
        metadata={
            "help": "What nesting is to be best at: prefixes that reconstruct alone (the default), edges of the tree "
            "that are right, or the whole dictionary's reconstruction; balanced is between the first and the last. It "
            "sets --inner-decoder-share and --inner-activation-share.",
        },
    )
    level_weights: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Weight of each level's loss: uniform, size, or a number per level. Default: uniform.",
        },
    )

    def grid(self) -> dict[str, Any]:
        """What `make_saes` takes, but for what was not given."""
        values = {known.name: getattr(self, known.name) for known in fields(self)}
        given = {name: value for name, value in values.items() if value is not None and value != []}
        given["sites"], given["sites_out"] = given.pop("site", []), given.pop("site_out", [])
        if "level_weights" in given:
            given["level_weights"] = _level_weights(given["level_weights"])
        return given


# Given as lists above, or said by the model, or of use only in evaluation mode.
NOT_FLAGS = frozenset(
    {
        "hidden_size",
        "hidden_size_out",
        "lookup_size",
        "lookup_tokenizer",
        "lookup_vocabulary",
        "num_latents",
        "prefix_sizes",
        "k",
        "level_weights",
        "inference",
    }
)
FORM_FIELDS = read_config_fields(without=NOT_FLAGS)
SAEArguments: Any = make_dataclass("SAEArguments", FORM_FIELDS, bases=(GridArguments,))
SAEArguments._argument_group_name = "sparse autoencoder"


@dataclass
class RunArguments:
    """What is done with all of this."""

    _argument_group_name = "run"

    tensor_parallel: bool = field(
        default=False,
        metadata={
            "help": "Split the language model over all processes, which then run it together, instead of a copy in "
            "each. For models that are too large for one device."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Say what the run would need in memory, disk and time, after a few probe steps, and stop."},
    )
    json: bool = common_fields.as_json()


def run(arguments: list[str], brief: bool = False) -> None:
    """Parse, train, print; `brief` leaves out what to do next."""
    parser = build_parser("train", DESCRIPTION, (SourceArguments, SAEArguments, SAETrainingArguments, RunArguments))
    sources, sae_args, training_args, run_args = parse(parser, arguments)

    from accelerate import PartialState

    from hf_msae.cli.sources import choose_device, load_language_model, load_training_data
    from hf_msae.modeling import MatryoshkaSAEConfig
    from hf_msae.training import SAETrainer
    from hf_msae.training.grid import make_saes, sites_of
    from hf_msae.training.outputs import check_output_dir
    from hf_msae.training.precision import describe_precision
    from hf_msae.training.run import check_trackers

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    # The process group: everything after it knows its device and rank.
    choose_device(training_args.use_cpu, timeout=timedelta(seconds=training_args.ddp_timeout))
    # Before anything is loaded; what comes later checks again.
    grid = sae_args.grid()
    form = {name: grid[name] for name, *_ in FORM_FIELDS if name in grid}
    transcoder = bool(grid["sites_out"]) or training_args.init_from is not None
    MatryoshkaSAEConfig(**form, hidden_size_out=MatryoshkaSAEConfig.hidden_size if transcoder else None)
    check_trackers(training_args.report_to)
    if PartialState().is_main_process and not run_args.dry_run:
        check_output_dir(training_args)
    dataset, eval_dataset = load_training_data(sources)
    model, tokenizer = load_language_model(sources, run_args.tensor_parallel)
    if training_args.init_from is None:
        grid["sites"] = grid["sites"] or sites_of(dataset)
    saes = make_saes(model, **grid, init_from=training_args.init_from)
    trainer = SAETrainer(model, saes, training_args, dataset, eval_dataset, processing_class=tokenizer)
    if run_args.dry_run:
        dry_run(trainer, run_args.json)
        return
    if trainer.run.is_main and trainer.run.device.type != "cpu":
        print(f"Training on {trainer.run.device} in {describe_precision(trainer.args)}.", flush=True)
    measurements = trainer.train()
    if PartialState().is_main_process:
        if run_args.json:
            print(as_json(trainer, measurements))
        else:
            report(trainer, measurements, sources, brief)


def as_json(trainer: "SAETrainer", measurements: "dict[str, Measurement]") -> str:
    """Each SAE's folder and what was measured, by its name."""
    folders = {name: trainer.run.sae_folder(trainer.run.output_dir, name) for name in measurements}
    saes = {name: {"folder": str(folders[name]), **measured.to_dict()} for name, measured in measurements.items()}
    return json.dumps({"output_dir": str(trainer.run.output_dir), "saes": saes})


def dry_run(trainer: "SAETrainer", print_json: bool = False) -> None:
    """Print the plan, and then, after a few passes and steps, how long the run would take. Nothing is written."""
    from accelerate import PartialState
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    plan, main = trainer.plan(), PartialState().is_main_process
    if print_json and main:
        print(json.dumps({"fits": not plan.warnings(), "needs": dict(plan.rows()), "warnings": plan.warnings()}))
    if print_json:
        sys.exit(1 if plan.warnings() else 0)
    if main:
        table = Table(show_header=False)
        for name, value in plan.rows():
            table.add_row(name, value)
        console.print(table)
        for words in plan.warnings():
            console.print(words, style="bold red", soft_wrap=True)
    if plan.warnings():
        sys.exit(1)
    rates = trainer.probe()
    if main:
        seconds = plan.tokens / rates.tokens_per_second
        through = f"{rates.language_model:,.0f} through the language model, {rates.steps:,.0f} in steps"
        duration = f"about {seconds / 3600:.1f} h" if seconds > 5400 else f"about {seconds / 60:.1f} min"
        console.print(f"{rates.tokens_per_second:,.0f} tokens/s ({through}): {duration} in all", soft_wrap=True)


def _level_weights(values: list[str]) -> str | list[float]:
    if len(values) == 1 and not values[0][0].isdigit():
        return values[0]
    return [float(Fraction(value)) for value in values]


def report(
    trainer: "SAETrainer", measurements: "dict[str, Measurement]", sources: SourceArguments, brief: bool = False
) -> None:
    """The table of each SAE, where it lies, and what to do next; `brief`, the table alone."""
    from rich.console import Console

    from hf_msae.metrics import table_rows
    from hf_msae.training.loaders import CacheLoader

    if isinstance(trainer.loader, CacheLoader):
        sources = _without_cache(sources)
    console = Console(highlight=False)
    for name, measurement in measurements.items():
        header, rows = table_rows(measurement)
        counted = f"{measurement.tokens:,} held-out tokens"
        if measurement.ce_tokens:
            counted += f", cross-entropy on {measurement.ce_tokens:,}"
        if measurement.outliers:
            counted += f"; {measurement.outliers:,} with outlying norms (attention sinks) left out"
        print_table(console, f"{name}, measured on {counted}", header, rows)
    if brief:
        return
    first = trainer.run.sae_folder(trainer.run.output_dir, next(iter(measurements)))
    saved = [str(trainer.run.sae_folder(trainer.run.output_dir, name)) for name in measurements]
    console.print("Saved to " + ", ".join(saved), soft_wrap=True)
    console.print(next_steps(first, sources), soft_wrap=True)


def next_steps(folder: Path, sources: SourceArguments) -> str:
    """Three commands that follow from a first run, as they are to be typed."""
    first, given = shlex.quote(str(folder)), _given_again(sources)
    return f"""
Next:
  hf-msae interpret {first}{given}      # a page for every latent; then `hf-msae tree`, `steer`
  hf-msae eval {first}{given}      # every metric at every level, beside baselines, as a report
  hf-msae train --model gpt2 --dataset Salesforce/wikitext --dataset-name wikitext-103-raw-v1 --max-tokens 20M \
--output-dir runs/gpt2      # your own model"""


def _given_again(sources: SourceArguments) -> str:
    """The flags that name the data, and how the model is loaded; which one it is the SAE says."""
    from hf_msae.data import is_activation_cache

    if sources.dataset is not None and is_activation_cache(sources.dataset):
        sources = _without_cache(sources)
    flags = ""
    for known in fields(sources):
        value = getattr(sources, known.name)
        if value == known.default or known.name in ("model", "model_revision"):
            continue
        flag = f" --{known.name.replace('_', '-')}"
        flags += flag if value is True else f"{flag} {shlex.quote(value)}"
    return flags


def _without_cache(sources: SourceArguments) -> SourceArguments:
    """Text to read, where a run read a cache, which holds none: what it measured on, or left for people to fill in."""
    return replace(sources, dataset=sources.eval_dataset or "...", dataset_revision=None, eval_dataset=None)
