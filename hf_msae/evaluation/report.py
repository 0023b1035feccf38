"""An evaluation on disk: `evaluation.json` with every number, and one HTML page that needs nothing else."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from hf_msae.atomic_files import atomic_file
from hf_msae.evaluation.absorption import ConceptAbsorption
from hf_msae.evaluation.plots import draw_plots
from hf_msae.evaluation.suite import Evaluation
from hf_msae.evaluation.tables import all_tables

TEMPLATE = Path(__file__).with_name("report.html")
JSON_NAME, HTML_NAME = "evaluation.json", "report.html"
# What the head of the page says, of the facts that there are.
SHOWN_FACTS = {
    "shape": "dictionary",
    "model": "language model",
    "site": "site",
    "dataset": "text",
    "tokens": "tokens",
    "outliers": "tokens with outlying norms, left out",
    "context_length": "context length",
    "labelled": "labelled data",
    "splits": "splits of the labelled data",
    "compared": "compared with",
    "seconds": "seconds",
    "versions": "versions",
}


def write_report(result: Evaluation, folder: Path) -> None:
    """Write both files, each whole or not at all."""
    contents = {HTML_NAME: render_html(result), JSON_NAME: json.dumps(result.to_dict(), indent=1) + "\n"}
    for name, text in contents.items():
        with atomic_file(folder / name) as draft:
            draft.write_text(text, encoding="utf-8")


def render_html(result: Evaluation) -> str:
    """The page; everything is inside it."""
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=False)
    shown = [(label, _write_fact(result.facts[name])) for name, label in SHOWN_FACTS.items() if result.facts.get(name)]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=result.facts,
        shown_facts=shown,
        tables=all_tables(result),
        plots=draw_plots(result),
        details=_details(result),
    )


def _write_fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _details(result: Evaluation) -> list[ConceptAbsorption]:
    """The concepts of the SAE that is evaluated, with its whole dictionary."""
    if not result.absorption:
        return []
    concepts = next(iter(result.absorption.values())).concepts
    widest = max((item.prefix for item in concepts), default=0)
    return [item for item in concepts if item.prefix == widest and item.recalls]
