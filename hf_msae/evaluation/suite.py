"""All metrics on all SAEs of one site, from one pass of the language model.

SAEs that differ only in their seed share a `method`, and tables show their mean with its spread. A metric of another
package is handed to [`evaluate`]. Those of `hf_msae.research` can be named, too: they are looked up where they are
asked for, so that this room neither imports the one above it nor needs it.
"""

import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from hf_msae.errors import InputError
from hf_msae.evaluation.absorption import AbsorptionMetric
from hf_msae.evaluation.activations import TextActivations
from hf_msae.evaluation.core import CoreMetric
from hf_msae.evaluation.erasure import ErasureMetric
from hf_msae.evaluation.geometry import GeometryMetric
from hf_msae.evaluation.labelled import LabelledActivations
from hf_msae.evaluation.metric import Evaluation, Metric, MetricInputs, Subject
from hf_msae.evaluation.names import DEFAULT_METRICS, METRICS
from hf_msae.evaluation.probing import ProbingMetric

logger = logging.getLogger(__name__)

CORE = CoreMetric()
_OWN: tuple[Metric[Any], ...] = (CORE, GeometryMetric(), ProbingMetric(), AbsorptionMetric(), ErasureMetric())
# By name, the modules and classes of metrics that stand above this room.
_RESEARCH = {
    "progressive": ("hf_msae.research.progressive", "ProgressiveMetric"),
    "stitching": ("hf_msae.research.stitching", "StitchingMetric"),
    "meta": ("hf_msae.research.meta", "MetaMetric"),
    "hedging": ("hf_msae.research.hedging", "HedgingMetric"),
}


def find_metrics(metrics: Sequence[str | Metric[Any]]) -> list[Metric[Any]]:
    """The metrics that are meant, in the order of the report: those of this package first, then others as given.

    Args:
        metrics: names, of `METRICS`, or metrics themselves.

    Returns:
        Each metric once.

    Raises:
        InputError: A name is no metric's, or two metrics have one name.
    """
    found: dict[str, Metric[Any]] = {}
    for metric in metrics:
        meant = _find(metric) if isinstance(metric, str) else metric
        if type(found.setdefault(meant.name, meant)) is not type(meant):
            raise InputError(f"Two metrics are called {meant.name!r}; give one of them another name.")
    order = {name: place for place, name in enumerate(METRICS)}
    return sorted(found.values(), key=lambda metric: order.get(metric.name, len(order)))


def _find(name: str) -> Metric[Any]:
    by_name = {metric.name: metric for metric in _OWN}
    if name in by_name:
        return by_name[name]
    if name not in _RESEARCH:
        raise InputError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")
    module, kind = _RESEARCH[name]
    metric: Metric[Any] = getattr(import_module(module), kind)()
    return metric


def evaluate(
    subjects: Sequence[Subject],
    text: TextActivations,
    labelled: LabelledActivations | None = None,
    of_documents: LabelledActivations | None = None,
    *,
    metrics: Sequence[str | Metric[Any]] = DEFAULT_METRICS,
    ce_tokens: int = 25_000,
    rate_tokens: int = 25_000,
    splits: int = 3,
    seed: int = 0,
) -> Evaluation:
    """Measure SAEs of one site.

    Args:
        subjects: the SAEs; the first is the one that is evaluated, the others are for comparison.
        text: activations of text, and the language model behind them, from [`collect`].
        labelled: examples for metrics of concepts; None leaves these out.
        of_documents: documents with several independent labels, for SCR; None leaves it out.
        metrics: names, or metrics themselves, in any order. The core is always measured, because the others need to
            know which latents fire.
        ce_tokens: how many tokens to run the language model on with reconstructions in place of activations; 0 for
            none.
        rate_tokens: how many tokens to code for the rate–distortion curve.
        splits: how often metrics of concepts divide the labelled documents anew.
        seed: of what metrics draw and train.

    Returns:
        Every number, and the metrics that were measured.

    Raises:
        InputError: A name is no metric's, or the labelled examples are too few.
    """
    chosen = find_metrics([CORE.name, *metrics])
    inputs = MetricInputs(subjects, text, labelled, of_documents, ce_tokens, rate_tokens, splits, seed)
    evaluation = Evaluation(
        {subject.name: subject.method for subject in subjects},
        {subject.name: list(subject.sae.config.prefix_sizes) for subject in subjects},
    )
    core = CORE.measure(inputs)
    evaluation.add(CORE, core)
    inputs.firing_rates = {name: result.firing_rate for name, result in core.items()}
    if text.y is not None:
        reason = "They compare decoder rows with what is read, which in a transcoder is another place."
        chosen = _only([(metric, metric.takes_transcoders) for metric in chosen], reason)
    if any(subject.sae.config.is_tokenized for subject in subjects):
        reason = "They take reconstructions apart into latents, and a tokenized SAE adds the token's own vector."
        chosen = _only([(metric, metric.takes_tokenized) for metric in chosen], reason)
    for metric in chosen[1:]:
        if labelled is not None or not metric.needs_labels:
            evaluation.add(metric, metric.measure(inputs))
    return evaluation


def _only(metrics: Sequence[tuple[Metric[Any], bool]], reason: str) -> list[Metric[Any]]:
    """The metrics that make sense; that others were asked for is said, with the reason."""
    left_out = [metric.name for metric, fits in metrics if not fits]
    if left_out:
        logger.warning("Left out: %s. %s", ", ".join(left_out), reason)
    return [metric for metric, fits in metrics if fits]
