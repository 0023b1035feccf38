"""All metrics on all SAEs of one site, from one pass of the language model.

An `Evaluation` holds every number with what it was measured on. SAEs that differ only in their seed share a `method`,
and tables show their mean with its spread.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from torch import Tensor
from transformers.utils import logging

from hf_msae.errors import InputError
from hf_msae.evaluation.absorption import ConceptAbsorption, LevelAbsorption, measure_absorption
from hf_msae.evaluation.activations import TextActivations
from hf_msae.evaluation.core import CoreResult, measure_core
from hf_msae.evaluation.erasure import PerturbationScore, RemovalScore, measure_perturbation, measure_removal
from hf_msae.evaluation.geometry import Agreement, LevelGeometry, measure_agreement, measure_geometry
from hf_msae.evaluation.labelled import LabelledActivations
from hf_msae.evaluation.probing import ProbingResult, Split, make_split, measure_probing
from hf_msae.modeling import MatryoshkaSAE

DEFAULT_METRICS = ("core", "geometry", "probing", "absorption", "erasure", "progressive")
# These train SAEs of their own, or take long.
METRICS = (*DEFAULT_METRICS, "stitching", "meta", "hedging")
OF_CONCEPTS = ("probing", "absorption", "erasure")
# Baselines whose directions nobody trained. The papers' own instruments, which ask what training made of directions,
# leave them out, and SAEs of which fewer latents fire than a meta-SAE or a law of importance needs.
UNTRAINED = ("frozen_decoder", "pca", "random")
MIN_FIRING = 16


@dataclass(frozen=True)
class Subject:
    """An SAE that is measured: its name, and the method of which it is one seed."""

    name: str
    method: str
    sae: MatryoshkaSAE


@dataclass
class AbsorptionResult:
    """Absorption of one SAE: means by level and split, and the concepts of the first split one by one."""

    levels: list[LevelAbsorption]
    concepts: list[ConceptAbsorption]


@dataclass
class ErasureResult:
    """Erasure of one SAE; `pairs_left_out` is of SCR."""

    perturbation: list[PerturbationScore]
    removal: list[RemovalScore]
    pairs_left_out: int


@dataclass
class Evaluation:
    """Every number. `facts` says what was evaluated on what; the rest is by the SAE's name where it is a mapping."""

    facts: dict[str, Any]
    methods: dict[str, str]
    core: dict[str, CoreResult]
    geometry: dict[str, list[LevelGeometry]] = field(default_factory=dict)
    agreement: list[Agreement] = field(default_factory=list)
    probing: ProbingResult | None = None
    absorption: dict[str, AbsorptionResult] = field(default_factory=dict)
    erasure: dict[str, ErasureResult] = field(default_factory=dict)
    progressive: Any = None
    stitching: list[Any] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    hedging: dict[str, list[Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without numbers of single latents; what could not be measured is null."""
        cleaned = _jsonable(self)
        assert isinstance(cleaned, dict)
        return cleaned


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


def check_metrics(metrics: Sequence[str]) -> None:
    """Raises `ValueError` for a name that is no metric."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise InputError(f"There is no metric {unknown[0]!r}; there are {', '.join(METRICS)}.")


def evaluate(
    subjects: Sequence[Subject],
    text: TextActivations,
    labelled: LabelledActivations | None,
    of_documents: LabelledActivations | None,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    ce_tokens: int = 25_000,
    rate_tokens: int = 25_000,
    splits: int = 3,
    seed: int = 0,
) -> Evaluation:
    """Measure SAEs of one site. The core is always measured, because the others need to know which latents fire.

    labelled: examples for probing, absorption and TPP; None skips them. of_documents: documents with several
    independent labels, for SCR; None skips it. splits: how often concept metrics divide the documents anew. seed: of
    what the papers' own instruments draw and train.
    Raises `ValueError` for an unknown metric and where the labelled data have too few examples.
    """
    check_metrics(metrics)
    saes = {subject.name: subject.sae for subject in subjects}
    core = measure_core(text, saes, ce_tokens=ce_tokens, rate_tokens=rate_tokens)
    result = Evaluation({}, {subject.name: subject.method for subject in subjects}, core)
    if "geometry" in metrics:
        rates = {name: core[name].firing_rate for name in saes}
        result.geometry = {name: measure_geometry(sae, rates[name]) for name, sae in saes.items()}
        for one, two in combinations(subjects, 2):
            if one.method == two.method:
                pair = ((subject.name, subject.sae, rates[subject.name]) for subject in (one, two))
                result.agreement += measure_agreement(*pair)
    if labelled is not None and set(metrics) & set(OF_CONCEPTS):
        made = [make_split(labelled, seed) for seed in logging.tqdm(range(splits), desc="Probes", unit=" split")]
        _measure_concepts(result, saes, labelled, of_documents, made, metrics)
    _measure_with_instruments(result, subjects, text, metrics, seed)
    return result


def _measure_concepts(
    result: Evaluation,
    saes: Mapping[str, MatryoshkaSAE],
    labelled: LabelledActivations,
    of_documents: LabelledActivations | None,
    splits: Sequence[Split],
    metrics: Sequence[str],
) -> None:
    if "probing" in metrics:
        result.probing = measure_probing(labelled, saes, splits)
    if "absorption" in metrics:
        for name, sae in logging.tqdm(saes.items(), desc="Absorption", unit=" SAE"):
            result.absorption[name] = AbsorptionResult(*measure_absorption(labelled, sae, splits))
    if "erasure" in metrics:
        for name, sae in logging.tqdm(saes.items(), desc="Erasure", unit=" SAE"):
            removal: tuple[list[RemovalScore], int] = ([], 0)
            if of_documents is not None:
                removal = measure_removal(of_documents, sae, [split.seed for split in splits])
            result.erasure[name] = ErasureResult(measure_perturbation(labelled, sae, splits), *removal)


def _measure_with_instruments(
    result: Evaluation, subjects: Sequence[Subject], text: TextActivations, metrics: Sequence[str], seed: int
) -> None:
    from hf_msae.research.instruments import (
        compare_prefixes,
        measure_composition,
        measure_hedging_of_prefixes,
        stitch,
    )

    saes = {subject.name: subject.sae for subject in subjects if subject.method not in UNTRAINED}
    saes = {name: sae for name, sae in saes.items() if int((result.core[name].firing_rate > 0).sum()) >= MIN_FIRING}
    if not saes:
        return
    if "progressive" in metrics:
        result.progressive = compare_prefixes(text, saes, subjects[0].sae.config.prefix_sizes, seed)
    if "stitching" in metrics:
        result.stitching = stitch(text, saes)
    if "meta" in metrics:
        result.meta = {name: measure_composition(sae, name, seed) for name, sae in saes.items()}
    if "hedging" in metrics:
        result.hedging = {name: measure_hedging_of_prefixes(text, sae, seed) for name, sae in saes.items()}
