"""`hf-msae eval`: every metric of an SAE, at every prefix, beside baselines that can make it look bad."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hf_msae.cli import common_fields
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.parser import build_parser, parse
from hf_msae.cli.terminal import print_table
from hf_msae.evaluation.arguments import EvaluationArguments

if TYPE_CHECKING:
    from hf_msae.evaluation import Evaluation

DESCRIPTION = """\
Measure an SAE at every prefix: reconstruction and what is left of the language model, geometry, and, on text whose
concepts are known, probing, splitting, absorption and erasure, and how its prefixes compare with sorted latents; on
request stitching, meta-SAEs and hedging. --baselines trains or builds what the numbers must be
seen beside, on the same tokens. Prints tables; writes evaluation.json and one self-contained report.html."""


@dataclass
class SubjectArguments:
    """Which SAEs are measured."""

    _argument_group_name = "SAEs"
    _positional = ("sae",)

    sae: str = field(metadata={"help": "A folder or a Hub repo."})
    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "More SAEs of the same site, such as other seeds, for the same tables."},
    )
    site: str | None = field(default=None, metadata={"help": "Where in the model, if the SAE does not say."})
    json: bool = common_fields.as_json()


@dataclass
class EvalSourceArguments(SourceArguments):
    """Where tokens come from and which model reads them; the SAE names its model."""

    _argument_group_name = "model and data"

    model: str = field(default="", metadata={"help": "The language model. Default: the one that the SAE names."})


def run(arguments: list[str]) -> None:
    """Parse, load, measure, print."""
    parser = build_parser("eval", DESCRIPTION, (SubjectArguments, EvaluationArguments, EvalSourceArguments))
    of, args, sources = parse(parser, arguments)

    from hf_msae.cli.sources import choose_device, complete_model, load_language_model, load_text
    from hf_msae.evaluation import run_evaluation
    from hf_msae.evaluation.pipeline import check_output, load_subjects
    from hf_msae.sites import recorded_site

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    choose_device(args.use_cpu)
    # Before anything is loaded; what comes later checks again.
    folder = check_output(args)
    subjects = load_subjects([of.sae, *of.compare])
    config = subjects[0].sae.config
    complete_model(sources, config, of.sae)
    site = of.site or recorded_site(config, called=of.sae)
    documents, eval_documents = load_text(sources)
    model, tokenizer = load_language_model(sources)
    result = run_evaluation(
        subjects,
        model,
        tokenizer,
        documents,
        args,
        eval_documents=eval_documents,
        site=site,
        text_column=sources.text_column,
        source=of.sae,
        model_name=sources.model,
    )
    if of.json:
        print(json.dumps(result.to_dict()))
    else:
        show(result, folder)


def show(result: "Evaluation", folder: Path) -> None:
    """The tables of the report, and where it is."""
    from rich.console import Console

    from hf_msae.evaluation.report import HTML_NAME, JSON_NAME
    from hf_msae.evaluation.tables import all_tables

    console = Console(highlight=False)
    for table in all_tables(result):
        print_table(console, table.title, table.header, table.rows, table.note)
    console.print(f"\nWrote {folder / HTML_NAME} and {folder / JSON_NAME}", soft_wrap=True)
