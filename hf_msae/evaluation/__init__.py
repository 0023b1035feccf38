"""Measuring an SAE: one module a question, and `evaluate` for all of them on the same tokens."""

from typing import TYPE_CHECKING

from hf_msae.importing import lazy_names
from hf_msae.moved import moved

if TYPE_CHECKING:
    from hf_msae.evaluation.activations import TextActivations, collect
    from hf_msae.evaluation.arguments import EvaluationArguments
    from hf_msae.evaluation.completing import complete, complete_on_text
    from hf_msae.evaluation.labelled import LabelledActivations, labelled_documents, read_labelled, story_examples
    from hf_msae.evaluation.metric import Details, Evaluation, Metric, MetricInputs, Plot, Subject, Table
    from hf_msae.evaluation.names import DEFAULT_METRICS, METRICS
    from hf_msae.evaluation.pipeline import load_subjects, run_evaluation
    from hf_msae.evaluation.report import write_report
    from hf_msae.evaluation.suite import evaluate
else:
    # The arguments are read by a command, before anything that takes time is imported.
    _HOMES = {
        "hf_msae.evaluation.activations": ("TextActivations", "collect"),
        "hf_msae.evaluation.arguments": ("EvaluationArguments",),
        "hf_msae.evaluation.completing": ("complete", "complete_on_text"),
        "hf_msae.evaluation.labelled": (
            "LabelledActivations",
            "labelled_documents",
            "read_labelled",
            "story_examples",
        ),
        "hf_msae.evaluation.metric": ("Details", "Evaluation", "Metric", "MetricInputs", "Plot", "Subject", "Table"),
        "hf_msae.evaluation.names": ("DEFAULT_METRICS", "METRICS"),
        "hf_msae.evaluation.pipeline": ("load_subjects", "run_evaluation"),
        "hf_msae.evaluation.report": ("write_report",),
        "hf_msae.evaluation.suite": ("evaluate",),
    }
    _look_up, __dir__ = lazy_names(__name__, {name: home for home, names in _HOMES.items() for name in names})
    __getattr__ = moved(__name__, "hf_msae.research.recovery", ("Recovery", "measure_recovery"), otherwise=_look_up)

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "Details",
    "Evaluation",
    "EvaluationArguments",
    "LabelledActivations",
    "Metric",
    "MetricInputs",
    "Plot",
    "Subject",
    "Table",
    "TextActivations",
    "collect",
    "complete",
    "complete_on_text",
    "evaluate",
    "labelled_documents",
    "load_subjects",
    "read_labelled",
    "run_evaluation",
    "story_examples",
    "write_report",
]
