"""An evaluation of steerings on disk, in the form of every evaluation: `evaluation.json` and one HTML page."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined

from hf_msae.atomic_files import atomic_file
from hf_msae.concepts.evaluating import NOTHING
from hf_msae.concepts.results import MethodResult, SteeringEvaluation
from hf_msae.evaluation.metric import Table
from hf_msae.evaluation.plots import COLOURS, MARKERS, draw_svg, legend_outside
from hf_msae.evaluation.report import HTML_NAME, JSON_NAME, TEMPLATE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = (
    "How much the texts show the concept, against their loss under the model as it is; a point for each strength, a "
    "mean over concepts. Higher at the same loss is better."
)


def steering_tables(evaluation: SteeringEvaluation) -> list[Table]:
    """A row for each method, then one for each concept.

    Args:
        evaluation: what was measured.
    """
    ranked = sorted(evaluation.methods, key=lambda method: -_mean(evaluation.of_method(method), "overall"))
    note = (
        "Means over concepts, on the prompts on which no strength was chosen. Overall is the harmonic mean of "
        "concept, fluency (exp of how much the loss exceeds that of unsteered texts) and instruction (likelier behind "
        "its own prompt than behind another); 95% is where it would lie with other concepts of the kind. KL is the "
        "change of neutral text's next tokens. Strength 1 costs a loss of "
        f"{evaluation.facts.get('loss', 0):g} there."
    )
    header = ["method", "overall", "95%", "concept", "fluency", "instruction", "loss", "KL", "strength"]
    rows = []
    for method in ranked:
        overall, *others = _cells(evaluation.of_method(method))
        ends = evaluation.interval(method)
        rows.append([method, overall, "–" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}", *others])
    by_concept = [
        [name, *(_number(_overall(evaluation, name, method)) for method in ranked)] for name in evaluation.latents
    ]
    return [
        Table(f"Steering, {len(evaluation.latents)} concepts", note, header, rows),
        Table("By concept", "Overall, on the same prompts.", ["concept", *ranked], by_concept),
    ]


def _cells(results: Sequence[MethodResult]) -> list[str]:
    names = ("overall", "concept", "fluency", "instruction", "loss")
    kls = [result.kl for result in results if result.kl is not None]
    return [
        *(_number(_mean(results, name) if name != "instruction" else _instruction(results)) for name in names),
        _number(fmean(kls) if kls else None),
        _number(fmean(result.strength for result in results) if kls else None),
    ]


def _mean(results: Sequence[MethodResult], name: str) -> float:
    return fmean(vars(result.reported)[name] for result in results)


def _instruction(results: Sequence[MethodResult]) -> float | None:
    values = [result.reported.instruction for result in results]
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _overall(evaluation: SteeringEvaluation, concept: str, method: str) -> float:
    return next(one.reported.overall for one in evaluation.of_method(method) if one.concept == concept)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def draw_curves(figure: "Figure", evaluation: SteeringEvaluation) -> None:
    """The concept score against the loss, a line for each method.

    Args:
        figure: of matplotlib, empty.
        evaluation: what was measured.
    """
    axis = figure.subplots()
    for number, method in enumerate(evaluation.methods):
        points = evaluation.curve(method)
        losses, scores = [loss for _, loss, _ in points], [score for _, _, score in points]
        axis.plot(
            losses,
            scores,
            markersize=5,
            linewidth=0 if method == NOTHING else 1.5,
            label=method,
            marker=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
        )
    axis.set_xlabel("loss under the model as it is (nats per token)")
    axis.set_ylabel("concept")
    legend_outside(axis)


def write_steering_report(evaluation: SteeringEvaluation, folder: str | Path, title: str) -> None:
    """Write both files, each whole or not at all.

    Args:
        evaluation: what is written.
        folder: where to; it is made where it is missing.
        title: of the page.
    """
    tables = steering_tables(evaluation)
    svg = draw_svg(lambda figure: draw_curves(figure, evaluation))
    shown = [(name.replace("_", " "), str(value)) for name, value in evaluation.facts.items()]
    shown += [("left out", f"{name}: {why}") for name, why in evaluation.skipped.items()]
    shown += [("note", warning) for warning in evaluation.warnings]
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=False)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title, facts=shown, tables=[(tables[0], [(CAPTION, svg)]), (tables[1], [])], details=[]
    )
    contents = {HTML_NAME: page, JSON_NAME: json.dumps(evaluation.to_dict(), indent=1) + "\n"}
    for name, text in contents.items():
        with atomic_file(Path(folder) / name) as draft:
            draft.write_text(text, encoding="utf-8")


def read_steering_report(folder: str | Path) -> SteeringEvaluation | None:
    """The evaluation in a folder; None where there is none, or one that another version or somebody else wrote.

    Args:
        folder: where `write_steering_report` may have written.
    """
    try:
        return SteeringEvaluation.from_dict(json.loads((Path(folder) / JSON_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
