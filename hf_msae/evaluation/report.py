"""An evaluation on disk: `evaluation.json` with every number, and one HTML page that needs nothing else."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from hf_msae.atomic_files import atomic_file
from hf_msae.evaluation.metric import Evaluation, Table
from hf_msae.evaluation.plots import draw_svg

TEMPLATE = Path(__file__).with_name("report.html")
JSON_NAME, HTML_NAME = "evaluation.json", "report.html"
# What the head of the page says, of the facts that there are.
SHOWN_FACTS = {
    "shape": "dictionary",
    "model": "language model",
    "site": "site",
    "site_out": "reconstructs",
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


def write_report(evaluation: Evaluation, folder: str | Path) -> None:
    """Write both files, each whole or not at all.

    Args:
        evaluation: what is written.
        folder: where to; it is made where it is missing.
    """
    contents = {HTML_NAME: render_html(evaluation), JSON_NAME: json.dumps(evaluation.to_dict(), indent=1) + "\n"}
    for name, text in contents.items():
        with atomic_file(Path(folder) / name) as draft:
            draft.write_text(text, encoding="utf-8")


def render_html(evaluation: Evaluation) -> str:
    """The page; everything is inside it.

    Args:
        evaluation: what it shows; its title is the fact "sae", or else the name of the first SAE.
    """
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=False)
    facts = evaluation.facts
    found = [metric.details(evaluation.results[metric.name], evaluation) for metric in evaluation.metrics]
    details = [
        (item.name, item.title, environment.from_string(_read(item.template)).render(item.values))
        for item in found
        if item is not None
    ]
    return environment.from_string(_read(TEMPLATE)).render(
        title=facts.get("sae", next(iter(evaluation.methods))),
        facts=[(label, _write_fact(facts[name])) for name, label in SHOWN_FACTS.items() if facts.get(name)],
        tables=_tables_with_plots(evaluation),
        details=details,
    )


def _tables_with_plots(evaluation: Evaluation) -> list[tuple[Table, list[tuple[str, str]]]]:
    """Every table, and the (caption, SVG) pairs that stand below its note: a metric's all at its first table."""
    found: list[tuple[Table, list[tuple[str, str]]]] = []
    for metric in evaluation.metrics:
        result = evaluation.results[metric.name]
        drawn = [(plot.caption, draw_svg(plot.draw)) for plot in metric.plots(result, evaluation)]
        for table in metric.tables(result, evaluation):
            found.append((table, drawn))
            drawn = []
    return found


def _read(template: Path) -> str:
    return template.read_text(encoding="utf-8")


def _write_fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
