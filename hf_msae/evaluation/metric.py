"""What a metric is: one question about SAEs, with its measuring, its rows in the report's tables, and its picture.

`evaluate` runs the metrics that it is given, and the report loops over those that ran; neither knows one by name. So
a metric is one class in one file, in this package or in any other.
"""

import dataclasses
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from torch import Tensor
from transformers.utils import logging

from hf_msae.errors import InputError
from hf_msae.evaluation.activations import TextActivations
from hf_msae.evaluation.labelled import LabelledActivations
from hf_msae.evaluation.probes import Split, make_split
from hf_msae.modeling import MatryoshkaSAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What evaluation.json has always held, in this order, and what stands there where it was not measured. Keys of other
# metrics come after these, and only where they were measured.
UNMEASURED: dict[str, Any] = {
    "core": {},
    "geometry": {},
    "agreement": [],
    "probing": None,
    "absorption": {},
    "erasure": {},
    "progressive": None,
    "stitching": [],
    "meta": {},
    "hedging": {},
}


@dataclass(frozen=True)
class Subject:
    """An SAE that is measured.

    Args:
        name: what it is called in tables and in evaluation.json; no two have the same.
        method: the recipe of which it is one seed. SAEs of one method share a row of a table.
        sae: in evaluation mode, on the device that it is to be measured on.
    """

    name: str
    method: str
    sae: MatryoshkaSAE


@dataclass
class MetricInputs:
    """What metrics measure: the SAEs of one site, and the data that all metrics share.

    Args:
        subjects: the SAEs; the first is the one that is evaluated, the others are for comparison.
        text: activations of text, (num_tokens, hidden_size), and the language model behind them.
        labelled: examples of which the concepts are known, or None.
        of_documents: documents with several independent labels, or None.
        ce_tokens: tokens on which to run the language model with reconstructions in place of activations; 0 for none.
        rate_tokens: tokens to code for the rate–distortion curve.
        num_splits: how often the labelled documents are divided anew into training and test documents.
        seed: of whatever a metric draws or trains.
        firing_rates: by the SAE's name the share of tokens on which each latent fires, (num_latents,) float64 on the
            CPU. They are measured before any metric but the core is asked.
    """

    subjects: Sequence[Subject]
    text: TextActivations
    labelled: LabelledActivations | None = None
    of_documents: LabelledActivations | None = None
    ce_tokens: int = 25_000
    rate_tokens: int = 25_000
    num_splits: int = 3
    seed: int = 0
    firing_rates: dict[str, Tensor] = field(default_factory=dict)

    @property
    def saes(self) -> dict[str, MatryoshkaSAE]:
        """The SAEs by their names, in the order of the subjects."""
        return {subject.name: subject.sae for subject in self.subjects}

    @property
    def examples(self) -> LabelledActivations:
        """The labelled examples, for metrics that need them.

        Raises:
            InputError: There are none.
        """
        if self.labelled is None:
            raise InputError("This metric needs labelled examples; give `labelled`, such as those of story_examples.")
        return self.labelled

    @cached_property
    def splits(self) -> list[Split]:
        """The divisions of the labelled documents, with probes on whole activations; made when first asked for.

        Raises:
            InputError: There are no labelled examples, or too few of every concept.
        """
        examples = self.examples
        seeds = logging.tqdm(range(self.num_splits), desc="Probes", unit=" split")
        return [make_split(examples, seed) for seed in seeds]


@dataclass(frozen=True)
class Table:
    """Text cells for the terminal and for the HTML report.

    Args:
        title: the heading.
        note: what the columns mean, and on how much they were measured.
        header: names of the columns.
        rows: cells; the first of a row is the method, which is not repeated where the row before has the same.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A picture of the HTML report.

    Args:
        caption: what it shows.
        draw: draws it on an empty matplotlib figure; the report gives it the page's style.
    """

    caption: str
    draw: Callable[["Figure"], None]


@dataclass(frozen=True)
class Details:
    """A section at the end of the HTML report, for what fits no table of methods and prefixes.

    Args:
        name: what the page's navigation calls it.
        title: the heading.
        template: a Jinja file with what stands below the heading.
        values: what the template is filled with.
    """

    name: str
    title: str
    template: Path
    values: Mapping[str, Any]


Result = TypeVar("Result")


class Metric(ABC, Generic[Result]):
    """One question about SAEs.

    A subclass says what it is called and what it needs, measures, and turns what it measured into rows, and into
    pictures where there is something to see. It keeps no state: results are handed to it.

    Attributes:
        name: what `evaluate(metrics=...)`, `hf-msae eval --metrics` and evaluation.json call it.
        needs_labels: whether it needs labelled examples; without these, `evaluate` leaves it out.
        takes_transcoders: whether it also makes sense where decoder rows are of another site than is read; where it
            does not, `evaluate` leaves it out of an evaluation of transcoders.
        takes_tokenized: whether it also makes sense where a part of the reconstruction is no latent's, but the token's
            own; where it does not, `evaluate` leaves it out where any SAE is tokenized.
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False
    takes_transcoders: ClassVar[bool] = False
    takes_tokenized: ClassVar[bool] = True

    @abstractmethod
    def measure(self, inputs: MetricInputs) -> Result | None:
        """Measure all SAEs.

        Args:
            inputs: the SAEs and the data.

        Returns:
            What the other methods are given. In evaluation.json dataclasses become objects, and tensors, which have a
            number for each latent, are left out. None where there was nothing to measure it on.
        """

    @abstractmethod
    def tables(self, result: Result, evaluation: "Evaluation") -> list[Table]:
        """The rows of the report.

        Args:
            result: what `measure` returned.
            evaluation: whose methods and prefixes the rows are of.

        Returns:
            Tables in the order in which they are shown; usually one.
        """

    def plots(self, result: Result, evaluation: "Evaluation") -> list[Plot]:
        """The pictures, which the HTML report shows below the first table's note; none by default.

        Args:
            result: what `measure` returned.
            evaluation: whose methods and prefixes are drawn.
        """
        return []

    def details(self, result: Result, evaluation: "Evaluation") -> Details | None:
        """A section of its own at the end of the HTML report; none by default.

        Args:
            result: what `measure` returned.
            evaluation: what it is part of.
        """
        return None

    def entries(self, result: Result) -> dict[str, Any]:
        """What evaluation.json holds of it, by key; by default the result under the metric's name.

        Args:
            result: what `measure` returned.
        """
        return {self.name: result}


@dataclass
class Evaluation:
    """Every number, and the metrics that say what they mean.

    `evaluation["probing"]` is what evaluation.json holds under that key, as the metric returned it.

    Args:
        methods: by the SAE's name the method that it is a seed of, in the order of the subjects.
        prefix_sizes: by the SAE's name its prefixes.
        facts: what was evaluated on what, as the report's head shows it.
        metrics: those that ran and found something to measure, in the order of the report.
        results: by the metric's name what it measured.
    """

    methods: dict[str, str]
    prefix_sizes: dict[str, list[int]]
    facts: dict[str, Any] = field(default_factory=dict)
    metrics: list[Metric[Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    def add(self, metric: Metric[Result], result: Result | None) -> None:
        """Take in what a metric measured; nothing where there was nothing to measure.

        Args:
            metric: the metric.
            result: what its `measure` returned.
        """
        if result is not None:
            self.metrics.append(metric)
            self.results[metric.name] = result

    def __getitem__(self, key: str) -> Any:
        return self.entries()[key]

    def entries(self) -> dict[str, Any]:
        """What evaluation.json holds beside the facts and the methods, by key, as the metrics returned it."""
        found = dict(UNMEASURED)
        for metric in self.metrics:
            found |= metric.entries(self.results[metric.name])
        return found

    def to_dict(self) -> dict[str, Any]:
        """The contents of evaluation.json, without numbers of single latents; what could not be measured is null."""
        contents = {"facts": self.facts, "methods": self.methods} | self.entries()
        return {name: _jsonable(value) for name, value in contents.items() if not _is_by_latent(value)}

    def names_by_method(self, names: Iterable[str] | None = None) -> dict[str, list[str]]:
        """The SAEs of each method.

        Args:
            names: of the SAEs to list; by default all.
        """
        found: dict[str, list[str]] = {}
        for name in self.methods if names is None else names:
            found.setdefault(self.methods[name], []).append(name)
        return found

    def __getattr__(self, name: str) -> Any:
        # In the version before, what evaluation.json holds stood in attributes.
        if name not in UNMEASURED:
            raise AttributeError(f"An Evaluation has no {name!r}.")
        warnings.warn(
            f"evaluation.{name} is now evaluation[{name!r}]; the old form goes with the next version.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self[name]


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {name: _jsonable(item) for name, item in vars(value).items() if not _is_by_latent(item)}
    if isinstance(value, Mapping):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_by_latent(value: Any) -> bool:
    """Whether it holds nothing but tensors, which have a number for each latent."""
    if isinstance(value, Mapping):
        return bool(value) and all(map(_is_by_latent, value.values()))
    if dataclasses.is_dataclass(value):
        return all(map(_is_by_latent, vars(value).values()))
    return isinstance(value, Tensor)
