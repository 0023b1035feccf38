"""`hf-msae train`: a grid of SAEs from one pass of a language model."""

import itertools
import logging
import shlex
import sys
from dataclasses import dataclass, field, fields
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from hf_msae.cli.parser import Collect, build_parser, parse
from hf_msae.cli.sources import SourceArguments, load_language_model, load_training_data
from hf_msae.data import CachedActivations, is_activation_cache
from hf_msae.errors import InputError
from hf_msae.metrics import Measurement, table_rows
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import resolve_site, site_width
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.training.outputs import check_output_dir
from hf_msae.training.preparation import read_initial_config, wider_prefix_sizes
from hf_msae.training.run import check_trackers

# Fields of SAEArguments that are fields of the configuration, as they are.
PLAIN_FIELDS = (
    "activation",
    "balance",
    "detach_prefixes",
    "log_loss",
    "prefix_sampling",
    "num_sampled_prefixes",
    "aux_loss_weight",
    "sparsity_weight",
)

DESCRIPTION = """\
Train a Matryoshka SAE, or, where --site, --num-latents or --k are given more than once, every combination of them from
one pass of the language model. Numbers may be written 65_536, 2k, 500M, 1/32. Without --model and --dataset: the story
world that ships with the package. With --init-from, an SAE's form is that of the one it begins with, but for what is
given here."""


@dataclass
class SAEArguments:
    """What is trained; the fields are those of `MatryoshkaSAEConfig`."""

    _argument_group_name = "sparse autoencoder"

    site: list[str] = field(
        default_factory=list,
        metadata={
            "action": Collect,
            "help": "Where in the model: layers.12, layers.12.mlp, layers.12.attn, embeddings, "
            "or a module path. Default: the middle layer.",
        },
    )
    num_latents: list[int] = field(
        default_factory=list,
        metadata={"action": Collect, "help": "Size of the dictionary. Default: 16 times the width."},
    )
    k: list[float] = field(
        default_factory=list,
        metadata={
            "action": Collect,
            "help": "Active latents per token. Default: 32, or fewer for a small dictionary.",
        },
    )
    prefix_sizes: list[str] = field(
        default_factory=list,
        metadata={
            "action": Collect,
            "help": "Nested sizes, as numbers of latents (2048 8192 65536) or shares (1/16 1/4 1). "
            "Default: 1/16 1/8 1/4 1/2 1.",
        },
    )
    activation: Literal["batch_topk", "topk", "jumprelu", "relu"] = field(
        default="batch_topk", metadata={"help": "How latents become sparse."}
    )
    level_weights: list[str] = field(
        default_factory=list,
        metadata={
            "action": Collect,
            "help": "Weight of each level's loss: uniform, size, or a number per level. Default: uniform.",
        },
    )
    balance: float | None = field(
        default=None,
        metadata={"help": "Weights c^(levels inward) instead, against hedging; 0.75 is a good first try."},
    )
    detach_prefixes: bool = field(
        default=False, metadata={"help": "Keep a level's gradient from the levels inside it."}
    )
    log_loss: bool = field(default=False, metadata={"help": "Weigh the logarithm of each level's loss."})
    prefix_sampling: Literal["fixed", "pareto"] = field(
        default="fixed", metadata={"help": "Train the prefix sizes, or draw new ones every step."}
    )
    num_sampled_prefixes: int = field(default=10, metadata={"help": "How many sizes a step draws with pareto."})
    aux_loss_weight: float = field(
        default=1 / 32, metadata={"help": "Weight of the loss that revives dead latents. Default: 1/32."}
    )
    sparsity_weight: float = field(default=0.01, metadata={"help": "Penalty of relu (where it starts) and jumprelu."})


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


def run(arguments: list[str]) -> None:
    """Parse, train, print."""
    parser = build_parser("train", DESCRIPTION, (SourceArguments, SAEArguments, SAETrainingArguments, RunArguments))
    sources, sae_args, training_args, run_args = parse(parser, arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    # The process group: everything after it knows its device and rank.
    PartialState(cpu=training_args.on_cpu, timeout=timedelta(seconds=training_args.ddp_timeout))
    # Before anything is loaded; the trainer checks again.
    check_trackers(training_args.report_to)
    if PartialState().is_main_process and not run_args.dry_run:
        check_output_dir(training_args)
    dataset, eval_dataset = load_training_data(sources)
    model, tokenizer = load_language_model(sources, run_args.tensor_parallel)
    saes = make_saes(model, sae_args, dataset, training_args.init_from)
    trainer = SAETrainer(model, saes, training_args, dataset, eval_dataset, processing_class=tokenizer)
    if run_args.dry_run:
        dry_run(trainer)
        return
    measurements = trainer.train()
    if PartialState().is_main_process:
        report(trainer, measurements, sources)


def dry_run(trainer: SAETrainer) -> None:
    """Print the plan, and then, after a few passes and steps, how long the run would take. Nothing is written."""
    console = Console(highlight=False)
    plan, main = trainer.plan(), PartialState().is_main_process
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


def make_saes(
    model: PreTrainedModel,
    args: SAEArguments,
    dataset: Any,
    init_from: str | None = None,
) -> list[MatryoshkaSAE]:
    """An SAE for every combination of sites, sizes and k; with `init_from`, otherwise of that one's form."""
    if init_from is not None:
        return _make_alike(model, args, read_initial_config(init_from))
    names = args.site or _default_sites(model, dataset)
    saes = []
    for name in names:
        site = resolve_site(model, name)
        width = site_width(model, site)
        default_k: list[float | None] = [None]
        for num_latents, k in itertools.product(args.num_latents or [16 * width], args.k or default_k):
            config = MatryoshkaSAEConfig(
                hidden_size=width,
                num_latents=num_latents,
                prefix_sizes=parse_prefix_sizes(args.prefix_sizes, num_latents),
                k=k if k is not None else min(32, max(1, num_latents // 128)),
                activation=args.activation,
                level_weights=_level_weights(args.level_weights),
                balance=args.balance,
                detach_prefixes=args.detach_prefixes,
                log_loss=args.log_loss,
                prefix_sampling=args.prefix_sampling,
                num_sampled_prefixes=args.num_sampled_prefixes,
                aux_loss_weight=args.aux_loss_weight,
                sparsity_weight=args.sparsity_weight,
                site=str(site),
            )
            saes.append(MatryoshkaSAE(config))
    return saes


def _make_alike(
    model: PreTrainedModel,
    args: SAEArguments,
    initial: MatryoshkaSAEConfig,
) -> list[MatryoshkaSAE]:
    """An SAE for every combination of sites, sizes and k, otherwise of the form of one that exists, but for arguments
    that are not at their defaults.
    """
    defaults = SAEArguments()
    given = {name: getattr(args, name) for name in PLAIN_FIELDS if getattr(args, name) != getattr(defaults, name)}
    if initial.site is None and not args.site:
        raise InputError("The SAE given with --init-from does not say where in the model it belongs; give --site.")
    saes = []
    for name in args.site or [str(initial.site)]:
        site = resolve_site(model, name)
        for num_latents, k in itertools.product(args.num_latents or [initial.num_latents], args.k or [initial.k]):
            values = initial.to_dict() | given
            sizes = parse_prefix_sizes(args.prefix_sizes, num_latents) or wider_prefix_sizes(initial, num_latents)
            values |= {"num_latents": num_latents, "k": k, "prefix_sizes": sizes, "measured": None, "site": str(site)}
            values |= {"inference": "threshold"}
            if args.level_weights or len(sizes) != initial.num_levels:
                values["level_weights"] = _level_weights(args.level_weights)
            saes.append(MatryoshkaSAE(MatryoshkaSAEConfig(**values)))
    return saes


def _default_sites(model: PreTrainedModel, dataset: Any) -> list[str]:
    """The sites of an activation cache, else the layer in the middle, where features are richest."""
    if isinstance(dataset, CachedActivations):
        return [str(site) for site in dataset.sites]
    layers = model.config.get_text_config().num_hidden_layers
    return [f"layers.{(layers - 1) // 2}"]


def parse_prefix_sizes(values: list[str], num_latents: int) -> list[int]:
    """Sizes from numbers and shares of `num_latents`; empty where none are given."""
    sizes = []
    for text in values:
        try:
            number = Fraction(text.replace("_", ""))
        except (ValueError, ZeroDivisionError):
            raise InputError(
                f"--prefix-sizes: {text!r} is neither a number of latents nor a share such as 1/16."
            ) from None
        # 1 is the whole dictionary: a prefix of a single latent is of no use to anyone.
        sizes.append(int(number * num_latents) if number <= 1 else int(number))
    return sizes


def _level_weights(values: list[str]) -> str | list[float]:
    if not values:
        return "uniform"
    if len(values) == 1 and not values[0][0].isdigit():
        return values[0]
    return [float(Fraction(value)) for value in values]


def report(trainer: SAETrainer, measurements: dict[str, Measurement], sources: SourceArguments) -> None:
    """The table of each SAE, where it lies, and what to do next."""
    console = Console(highlight=False)
    for name, measurement in measurements.items():
        header, rows = table_rows(measurement)
        counted = f"{measurement.tokens:,} held-out tokens"
        if measurement.ce_tokens:
            counted += f", cross-entropy on {measurement.ce_tokens:,}"
        if measurement.outliers:
            counted += f"; {measurement.outliers:,} with outlying norms (attention sinks) left out"
        console.print(f"\n[bold]{name}[/bold], measured on {counted}", soft_wrap=True)
        table = Table()
        for column in header:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
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
    """The flags that name the data, and how the model is loaded; which one it is the SAE says. An activation cache
    holds no text to read, so text is left for people to fill in.
    """
    flags = ""
    for known in fields(sources):
        value = getattr(sources, known.name)
        if value == known.default or known.name in ("model", "model_revision"):
            continue
        if known.name == "dataset" and is_activation_cache(value):
            value = "..."
        flag = f" --{known.name.replace('_', '-')}"
        flags += flag if value is True else f"{flag} {shlex.quote(value)}"
    return flags
