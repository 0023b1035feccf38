"""`hf-msae eval`: every metric of an SAE, at every prefix, beside baselines that can make it look bad."""

import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.parser import build_parser, parse
from hf_msae.cli.sources import STORIES, load_language_model, load_training_data
from hf_msae.data import CachedActivations
from hf_msae.errors import InputError
from hf_msae.evaluation import DEFAULT_METRICS, METRICS, Evaluation, Subject, collect, evaluate, write_report
from hf_msae.evaluation.activations import TextActivations
from hf_msae.evaluation.baselines import BASELINES, TRAINED, check_baselines, make_baselines
from hf_msae.evaluation.labelled import LabelledActivations, labelled_documents, read_labelled, story_examples
from hf_msae.evaluation.report import HTML_NAME, JSON_NAME
from hf_msae.evaluation.suite import find_metrics
from hf_msae.evaluation.tables import all_tables
from hf_msae.language_models import model_of
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.modeling.untrusted import read_json
from hf_msae.outliers import NORM_OUTLIER_MULTIPLE, check_multiple
from hf_msae.sites import find_site, resolve_site
from hf_msae.training import SAETrainingArguments
from hf_msae.training.loaders import window_length

DESCRIPTION = """\
Measure an SAE at every prefix: reconstruction and what is left of the language model, geometry, and, on text whose
concepts are known, probing, splitting, absorption and erasure, and how its prefixes compare with sorted latents; on
request stitching, meta-SAEs and hedging. --baselines trains or builds what the numbers must be
seen beside, on the same tokens. Prints tables; writes evaluation.json and one self-contained report.html."""

BASELINE_FOLDER = "baselines"
# What of the SAE's own training a baseline shares.
SHARED_ARGUMENTS = (
    "per_device_train_batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "decay_steps",
    "max_grad_norm",
    "context_length",
    "packing",
    "block_tokens",
    "calibration_tokens",
    "norm_outlier_multiple",
    "bf16",
)


@dataclass
class EvalSourceArguments(SourceArguments):
    """Where tokens come from and which model reads them; the SAE names its model."""

    _argument_group_name = "model and data"

    model: str = field(default="", metadata={"help": "The language model. Default: the one that the SAE names."})


@dataclass
class EvalArguments:
    """What is measured, and on how much."""

    _argument_group_name = "evaluation"
    _positional = ("sae",)

    sae: str = field(metadata={"help": "A folder or a Hub repo."})
    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "More SAEs of the same site, such as other seeds, for the same tables."},
    )
    metrics: list[str] = field(
        default_factory=lambda: list(DEFAULT_METRICS),
        metadata={
            "help": f"Of {', '.join(METRICS)}; splitting goes with absorption. Default: all but the last three, which "
            "take longer.",
        },
    )
    baselines: list[str] = field(
        default_factory=lambda: ["pca", "random"],
        metadata={
            "help": "Of batch_topk, pruned_topk, frozen_decoder (trained), pca, random (built); 'none' for none. "
            "Default: pca random.",
        },
    )
    baseline_seeds: int = field(default=1, metadata={"help": "How many seeds of each trained or random baseline."})
    baseline_tokens: int | None = field(
        default=None, metadata={"help": "Train baselines on this many tokens. Default: as many as the SAE was."}
    )
    site: str | None = field(default=None, metadata={"help": "Where in the model, if the SAE does not say."})
    output_dir: str = field(default="runs/evaluation", metadata={"help": "Where the JSON and the report go."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an evaluation that is there."})
    eval_tokens: int = field(default=100_000, metadata={"help": "Tokens to measure on, of held-out documents."})
    ce_tokens: int = field(default=25_000, metadata={"help": "How many of them cross-entropy takes; 0 skips it."})
    rate_tokens: int = field(default=25_000, metadata={"help": "How many of them rate and distortion take."})
    context_length: int | None = field(default=None, metadata={"help": "Tokens per window. Default: as in training."})
    packing: bool = field(default=True, metadata={"help": "Pack documents into full windows."})
    lm_batch_size: int = field(default=16, metadata={"help": "Windows per forward pass."})
    norm_outlier_multiple: float | None = field(
        default=NORM_OUTLIER_MULTIPLE,
        metadata={
            "help": "Leave out tokens whose norm exceeds this multiple of the median, where the SAE does not record a "
            "limit of its own; 0 keeps all."
        },
    )
    stories: int = field(
        default=600, metadata={"help": "Stories whose words are labelled, for concept metrics; 0 skips these."}
    )
    labelled: str | None = field(
        default=None, metadata={"help": "A .jsonl file with a text and a label in each line, instead of stories."}
    )
    label_column: str = field(default="label", metadata={"help": "Column with the label."})
    splits: int = field(default=3, metadata={"help": "How often concept metrics divide the labelled documents anew."})
    seed: int = field(default=0, metadata={"help": "Fixes baselines, and what metrics draw."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU even where an accelerator is present."})

    def __post_init__(self) -> None:
        self.baselines = [name for name in self.baselines if name != "none"]
        find_metrics(self.metrics)
        check_baselines(self.baselines)
        check_multiple(self.norm_outlier_multiple)
        least = {"baseline_seeds": 1, "eval_tokens": 2, "rate_tokens": 2, "lm_batch_size": 1, "splits": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise InputError(f"{name} must be at least {lowest}, got {getattr(self, name)}.")
        for name in ("ce_tokens", "stories"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}.")


def run(arguments: list[str]) -> None:
    """Parse, check everything, measure, write, print."""
    parser = build_parser("eval", DESCRIPTION, (EvalArguments, EvalSourceArguments))
    args, sources = parse(parser, arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    began = time.perf_counter()
    PartialState(cpu=args.use_cpu)
    folder = _check_output(args)
    subjects = _load_all([args.sae, *args.compare])
    config = subjects[0].sae.config
    _complete_sources(sources, args, config)
    documents, eval_documents = load_training_data(sources)
    if isinstance(documents, CachedActivations):
        raise InputError(f"--dataset {sources.dataset} is an activation cache; give text.")
    pairs = read_labelled(args.labelled, sources.text_column, args.label_column) if args.labelled else None
    training = _training_arguments(args, folder)
    model, tokenizer = load_language_model(sources)
    site = resolve_site(model, args.site or config.site or "")
    for subject in subjects:
        find_site(model, subject.sae.config, site, called=subject.name)
        subject.sae.to(PartialState().device)
    wanted = SAETrainingArguments(context_length=args.context_length or config.context_length)
    context_length = window_length(model, wanted)
    source = documents if eval_documents is None else eval_documents
    text = collect(
        model,
        tokenizer,
        site,
        source,
        num_tokens=args.eval_tokens,
        context_length=context_length,
        packing=args.packing,
        lm_batch_size=args.lm_batch_size,
        norm_limit=config.norm_limit,
        norm_outlier_multiple=args.norm_outlier_multiple,
    )
    if eval_documents is None:
        _warn_of_seen_text(args, text)
    labelled, of_documents = _labelled(args, pairs, text, tokenizer, context_length)
    seeds = range(args.seed, args.seed + args.baseline_seeds)
    subjects += make_baselines(
        args.baselines, subjects[0], text, tokenizer, documents, eval_documents, args=training, seeds=seeds
    )
    result = evaluate(
        subjects,
        text,
        labelled,
        of_documents,
        metrics=args.metrics,
        ce_tokens=args.ce_tokens,
        rate_tokens=args.rate_tokens,
        splits=args.splits,
        seed=args.seed,
    )
    result.facts = _facts(args, sources, config, text, labelled, context_length, time.perf_counter() - began)
    result.facts["compared"] = [name for name in result.methods if name != subjects[0].name]
    write_report(result, folder)
    _print(result, folder)


def _warn_of_seen_text(args: EvalArguments, text: TextActivations) -> None:
    """Say where some of the text that is measured on is text that the SAE was trained on, as its run recorded."""
    path = Path(args.sae) / "metrics.json"
    run = read_json(path) if path.is_file() else {}
    held_out = run.get("held_out")
    measuring = held_out.get("measuring") if isinstance(held_out, dict) else None
    if not isinstance(measuring, dict) or run.get("dataset") != text.description:
        return
    share, tokens = measuring.get("share"), measuring.get("tokens")
    if isinstance(share, int | float) and isinstance(tokens, int) and text.held_out_share > share:
        logging.getLogger(__name__).warning(
            "The SAE was trained on some of the text that it is measured on: its run held out %s tokens of %s, fewer "
            "than these %s. Give --eval-tokens %d, or other text as --eval-dataset.",
            *(f"{tokens:,}", text.description, f"{text.num_tokens:,}", tokens),
        )


def _check_output(args: EvalArguments) -> Path:
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"The output directory {folder} is a file; give a folder.")
    traces = [name for name in (JSON_NAME, HTML_NAME, BASELINE_FOLDER) if (folder / name).exists()]
    if traces and not args.overwrite_output_dir:
        raise InputError(
            f"{folder} holds another evaluation ({', '.join(traces)}). Give --overwrite-output-dir to replace it, or "
            "another --output-dir."
        )
    shutil.rmtree(folder / BASELINE_FOLDER, ignore_errors=True)
    return folder


def _load_all(sources: list[str]) -> list[Subject]:
    """SAEs under names that differ; those whose configurations say the same are seeds of one method."""
    subjects: list[Subject] = []
    for source in sources:
        sae = MatryoshkaSAE.from_pretrained(source).eval()
        label = Path(source).resolve().name if Path(source).is_dir() else source
        name, number = label, 2
        while name in {*BASELINES, *(other.name for other in subjects)}:
            name, number = f"{label} ({number})", number + 1
        same = [other.method for other in subjects if _same_kind(other.sae, sae)]
        subjects.append(Subject(name, same[0] if same else name, sae))
    return subjects


def _complete_sources(sources: SourceArguments, args: EvalArguments, config: MatryoshkaSAEConfig) -> None:
    if not sources.model:
        name, revision = model_of(config)
        if name is None:
            raise InputError(f"{args.sae} does not say which language model it is of; give --model.")
        sources.model, sources.model_revision = name, sources.model_revision or revision
    if args.site is None and config.site is None:
        raise InputError(f"{args.sae} does not say where in the model it is from; give --site, such as layers.12.")


def _training_arguments(args: EvalArguments, folder: Path) -> SAETrainingArguments | None:
    """How baselines are trained: as the SAE was, if it lies in the folder of its run. None where none is trained."""
    if not set(args.baselines) & set(TRAINED):
        return None
    values: dict[str, Any] = {}
    own = Path(args.sae)
    if (own / "training_arguments.json").is_file():
        recorded = read_json(own / "training_arguments.json")
        values = {name: recorded[name] for name in SHARED_ARGUMENTS if name in recorded}
    tokens = args.baseline_tokens
    if tokens is None and (own / "metrics.json").is_file():
        tokens = read_json(own / "metrics.json").get("training_tokens")
    if tokens is None:
        raise InputError(f"{args.sae} does not say on how many tokens it was trained; give --baseline-tokens.")
    values |= {"max_tokens": tokens, "save_steps": 0, "ce_tokens": 0, "eval_tokens": args.eval_tokens}
    values |= {"use_cpu": args.use_cpu, "lm_batch_size": args.lm_batch_size}
    try:
        return SAETrainingArguments(output_dir=str(folder / BASELINE_FOLDER), **values)
    except (TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"training_arguments.json or metrics.json of {args.sae} holds what no run writes ({error!s:.200}); delete "
            "them and give --baseline-tokens."
        ) from error


def _labelled(
    args: EvalArguments,
    pairs: list[tuple[str, str]] | None,
    text: TextActivations,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
) -> tuple[LabelledActivations | None, LabelledActivations | None]:
    model, site = text.model, text.site
    options: dict[str, Any] = {"context_length": context_length, "lm_batch_size": args.lm_batch_size}
    options["norm_limit"] = text.norm_limit
    if not any(metric.needs_labels for metric in find_metrics(args.metrics)):
        return None, None
    if pairs is not None:
        description = f"{len(pairs):,} documents of {Path(str(args.labelled)).name}"
        return labelled_documents(model, tokenizer, site, pairs, description=description, **options), None
    if args.stories == 0:
        return None, None
    return story_examples(model, tokenizer, site, num_stories=args.stories, **options)


def _same_kind(one: MatryoshkaSAE, two: MatryoshkaSAE) -> bool:
    fields = ["num_latents", "prefix_sizes", "k", "activation", "balance", "level_weights", "detach_prefixes"]
    fields += ["log_loss", "prefix_sampling", "inference"]
    configs = one.config.to_dict(), two.config.to_dict()
    return all(configs[0][name] == configs[1][name] for name in fields)


def _facts(
    args: EvalArguments,
    sources: SourceArguments,
    config: MatryoshkaSAEConfig,
    text: TextActivations,
    labelled: LabelledActivations | None,
    context_length: int,
    seconds: float,
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "sae": args.sae,
        "shape": f"{config.num_latents:,} latents of width {config.hidden_size}, prefixes "
        f"{', '.join(f'{size:,}' for size in config.prefix_sizes)}; {config.activation}, k = {config.k:g}",
        "model": sources.model if sources.model != STORIES else "the story model of hf_msae",
        "site": str(text.site),
        "dataset": text.description,
        "tokens": text.num_tokens,
        "outliers": text.num_outliers,
        "norm_limit": round(text.norm_limit, 4),
        "context_length": context_length,
        "seconds": round(seconds),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if labelled is not None:
        facts["labelled"] = f"{labelled.description}; {labelled.num_examples:,} examples"
        facts["splits"] = args.splits
    return facts


def _print(result: Evaluation, folder: Path) -> None:
    console = Console(highlight=False)
    for table in all_tables(result):
        console.print(f"\n[bold]{table.title}[/bold]", soft_wrap=True)
        shown = Table()
        for number, name in enumerate(table.header):
            shown.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
        for number, row in enumerate(table.rows):
            same = number > 0 and row[0] == table.rows[number - 1][0]
            shown.add_row(*(["", *row[1:]] if same else row))
        if table.rows:
            # Numbers with their ends cut off are worse than lines that the terminal breaks.
            wide = console.measure(shown, options=console.options.update(max_width=1000)).maximum
            Console(highlight=False, width=max(console.width, wide)).print(shown)
        console.print(table.note, style="dim", markup=False)
    console.print(f"\nWrote {folder / HTML_NAME} and {folder / JSON_NAME}", soft_wrap=True)
