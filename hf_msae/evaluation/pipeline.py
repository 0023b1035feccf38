"""A whole evaluation: collect activations, label words, make baselines, measure all of it, write the report."""

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data.documents import DocumentsLike
from hf_msae.data.lookups import check_lookup
from hf_msae.devices import device_of
from hf_msae.errors import InputError
from hf_msae.evaluation.activations import TextActivations, collect
from hf_msae.evaluation.arguments import EvaluationArguments
from hf_msae.evaluation.baselines import BASELINES, TRAINED, make_baselines
from hf_msae.evaluation.labelled import LabelledActivations, labelled_documents, read_labelled, story_examples
from hf_msae.evaluation.metric import Evaluation, Subject
from hf_msae.evaluation.report import HTML_NAME, JSON_NAME, write_report
from hf_msae.evaluation.suite import evaluate, find_metrics
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.modeling.untrusted import read_json
from hf_msae.sites import find_output_site, find_site, recorded_site, resolve_site
from hf_msae.training import SAETrainingArguments
from hf_msae.training.loaders import window_length
from hf_msae.worlds import STORIES

logger = logging.getLogger(__name__)

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


def run_evaluation(
    subjects: Sequence[Subject],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: DocumentsLike,
    args: EvaluationArguments,
    *,
    eval_documents: "DocumentsLike | None" = None,
    site: str | None = None,
    text_column: str = "text",
    source: str | Path | None = None,
    model_name: str | None = None,
) -> Evaluation:
    """Measure SAEs at every prefix, beside baselines that can make them look bad, and write the report.

    Args:
        subjects: from [`load_subjects`]; the first is the one that is evaluated, the others stand beside it.
        model: the language model.
        tokenizer: its own.
        documents: `Documents`, or what `as_documents` takes: what baselines are trained on, and, where there are no
            others to measure on, of which documents are held out to measure on.
        args: what is measured; what is written goes to `args.output_dir`.
        eval_documents: to measure on instead.
        site: where in the model, if the first SAE does not say.
        text_column: of the labelled examples in `args.labelled`.
        source: the folder or the repo of the first SAE. Where its run lies there, baselines are trained as it was, and
            the report names it. By default the SAE's `name_or_path`.
        model_name: how the report names the language model; by default its `name_or_path`.

    Returns:
        Every number, and the facts that the report shows.

    Raises:
        OutputExistsError: another evaluation is in the folder.
        InputError: something does not fit: an SAE the site, a baseline the SAE, a label the text.
    """
    began = time.perf_counter()
    folder = check_output(args)
    shutil.rmtree(folder / BASELINE_FOLDER, ignore_errors=True)
    first = subjects[0]
    config = first.sae.config
    source = str(source or config.name_or_path or first.name)
    pairs = read_labelled(args.labelled, text_column, args.label_column) if args.labelled else None
    training = _training_arguments(args, source, folder)
    where = resolve_site(model, site or recorded_site(config, called=first.name))
    where_out = find_output_site(model, config, where, called=first.name) if config.is_transcoder else None
    for subject in subjects:
        find_site(model, subject.sae.config, where, called=subject.name)
        check_lookup(subject.sae.config, model, tokenizer, called=subject.name)
        if subject.sae.config.is_transcoder != config.is_transcoder:
            raise InputError(
                f"{first.name} and {subject.name} cannot stand in one table: one reconstructs what it reads, and the "
                "other is a transcoder, which reconstructs another place. Evaluate them apart."
            )
        find_output_site(model, subject.sae.config, where, where_out, called=subject.name)
        subject.sae.to(device_of(model))  # type: ignore[arg-type]  # transformers hides the signature
    wanted = SAETrainingArguments(context_length=args.context_length or config.context_length)
    context_length = window_length(model, wanted)
    text = collect(
        model,
        tokenizer,
        where,
        documents if eval_documents is None else eval_documents,
        num_tokens=args.eval_tokens,
        context_length=context_length,
        packing=args.packing,
        lm_batch_size=args.lm_batch_size,
        norm_limit=config.norm_limit,
        norm_outlier_multiple=args.norm_outlier_multiple,
        site_out=where_out,
        norm_limit_out=config.norm_limit_out,
    )
    if eval_documents is None:
        _warn_of_seen_text(source, text)
    labelled, of_documents = _labelled(args, pairs, text, tokenizer, context_length)
    seeds = range(args.seed, args.seed + args.baseline_seeds)
    compared = make_baselines(
        args.baselines, first, text, tokenizer, documents, eval_documents, args=training, seeds=seeds
    )
    result = evaluate(
        [*subjects, *compared],
        text,
        labelled,
        of_documents,
        metrics=args.metrics,
        ce_tokens=args.ce_tokens,
        rate_tokens=args.rate_tokens,
        splits=args.splits,
        seed=args.seed,
    )
    result.facts = {"sae": source, "shape": _shape(config)}
    result.facts |= _facts_of_text(text, context_length, str(model_name or model.config.name_or_path))
    result.facts["seconds"] = round(time.perf_counter() - began)
    result.facts["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    if labelled is not None:
        result.facts["labelled"] = f"{labelled.description}; {labelled.num_examples:,} examples"
        result.facts["splits"] = args.splits
    result.facts["compared"] = [name for name in result.methods if name != first.name]
    write_report(result, folder)
    return result


def check_output(args: EvaluationArguments) -> Path:
    """The folder that an evaluation is written to, if it may be.

    Args:
        args: of the evaluation.

    Raises:
        InputError: the folder is a file, or holds another evaluation that is not to be replaced.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"The output directory {folder} is a file; give a folder.")
    traces = [name for name in (JSON_NAME, HTML_NAME, BASELINE_FOLDER) if (folder / name).exists()]
    if traces and not args.overwrite_output_dir:
        raise InputError(
            f"{folder} holds another evaluation ({', '.join(traces)}). Give --overwrite-output-dir to replace it, or "
            "another --output-dir."
        )
    return folder


def load_subjects(sources: Sequence[str | Path]) -> list[Subject]:
    """SAEs under names that differ; those whose configurations say the same are seeds of one method.

    Args:
        sources: folders or repos of the Hub, as `MatryoshkaSAE.from_pretrained` takes them.

    Returns:
        The SAEs in evaluation mode, each called as its folder or repo is.
    """
    subjects: list[Subject] = []
    for source in map(str, sources):
        sae = MatryoshkaSAE.from_pretrained(source).eval()
        label = Path(source).resolve().name if Path(source).is_dir() else source
        name, number = label, 2
        while name in {*BASELINES, *(other.name for other in subjects)}:
            name, number = f"{label} ({number})", number + 1
        same = [other.method for other in subjects if _same_kind(other.sae, sae)]
        subjects.append(Subject(name, same[0] if same else name, sae))
    return subjects


def _same_kind(one: MatryoshkaSAE, two: MatryoshkaSAE) -> bool:
    fields = ["num_latents", "prefix_sizes", "k", "activation", "balance", "level_weights", "detach_prefixes"]
    fields += ["log_loss", "prefix_sampling", "inference"]
    configs = one.config.to_dict(), two.config.to_dict()
    return all(configs[0][name] == configs[1][name] for name in fields)


def _warn_of_seen_text(source: str, text: TextActivations) -> None:
    """Say where some of the text that is measured on is text that the SAE was trained on, as its run recorded."""
    path = Path(source) / "metrics.json"
    run = read_json(path) if path.is_file() else {}
    held_out = run.get("held_out")
    measuring = held_out.get("measuring") if isinstance(held_out, dict) else None
    if not isinstance(measuring, dict) or run.get("dataset") != text.description:
        return
    share, tokens = measuring.get("share"), measuring.get("tokens")
    if isinstance(share, int | float) and isinstance(tokens, int) and text.held_out_share > share:
        logger.warning(
            "The SAE was trained on some of the text that it is measured on: its run held out %s tokens of %s, fewer "
            "than these %s. Give --eval-tokens %d, or other text as --eval-dataset.",
            *(f"{tokens:,}", text.description, f"{text.num_tokens:,}", tokens),
        )


def _training_arguments(args: EvaluationArguments, source: str, folder: Path) -> SAETrainingArguments | None:
    """How baselines are trained: as the SAE was, if it lies in the folder of its run. None where none is trained."""
    if not set(args.baselines) & set(TRAINED):
        return None
    values: dict[str, Any] = {}
    own = Path(source)
    if (own / "training_arguments.json").is_file():
        recorded = read_json(own / "training_arguments.json")
        values = {name: recorded[name] for name in SHARED_ARGUMENTS if name in recorded}
    tokens = args.baseline_tokens
    if tokens is None and (own / "metrics.json").is_file():
        tokens = read_json(own / "metrics.json").get("training_tokens")
    if tokens is None:
        raise InputError(f"{source} does not say on how many tokens it was trained; give --baseline-tokens.")
    values |= {"max_tokens": tokens, "save_steps": 0, "ce_tokens": 0, "eval_tokens": args.eval_tokens}
    values |= {"use_cpu": args.use_cpu, "lm_batch_size": args.lm_batch_size}
    try:
        return SAETrainingArguments(output_dir=str(folder / BASELINE_FOLDER), **values)
    except (TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"training_arguments.json or metrics.json of {source} holds what no run writes ({error!s:.200}); delete "
            "them and give --baseline-tokens."
        ) from error


def _labelled(
    args: EvaluationArguments,
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


def _shape(config: MatryoshkaSAEConfig) -> str:
    prefixes = ", ".join(f"{size:,}" for size in config.prefix_sizes)
    return (
        f"{config.num_latents:,} latents of width {config.hidden_size}, prefixes {prefixes}; {config.activation}, "
        f"k = {config.k:g}"
    )


def _facts_of_text(text: TextActivations, context_length: int, model_name: str) -> dict[str, Any]:
    return {
        "model": model_name if model_name != STORIES else "the story model of hf_msae",
        "site": str(text.site),
        **({} if text.site_out is None else {"site_out": str(text.site_out)}),
        "dataset": text.description,
        "tokens": text.num_tokens,
        "outliers": text.num_outliers,
        "norm_limit": round(text.norm_limit, 4),
        "context_length": context_length,
    }
