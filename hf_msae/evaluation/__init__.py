"""Measuring an SAE: one module a question, and `evaluate` for all of them on the same tokens."""

from hf_msae.evaluation.activations import TextActivations, collect
from hf_msae.evaluation.labelled import LabelledActivations, labelled_documents, read_labelled, story_examples
from hf_msae.evaluation.metric import Details, Evaluation, Metric, MetricInputs, Plot, Subject, Table
from hf_msae.evaluation.report import write_report
from hf_msae.evaluation.suite import DEFAULT_METRICS, METRICS, evaluate
from hf_msae.moved import moved

__getattr__ = moved(__name__, "hf_msae.research.recovery", ("Recovery", "measure_recovery"))

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "Details",
    "Evaluation",
    "LabelledActivations",
    "Metric",
    "MetricInputs",
    "Plot",
    "Subject",
    "Table",
    "TextActivations",
    "collect",
    "evaluate",
    "labelled_documents",
    "read_labelled",
    "story_examples",
    "write_report",
]
