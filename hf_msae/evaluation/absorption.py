"""Feature splitting and absorption: whether a general concept has latents of its own that fire wherever it holds.

Splitting: how many main latents a concept has (`splitting.py`). Absorption: the concept is there (a probe on the whole
activation says so, rightly), the main latents are silent, and another latent, usually that of a special case, carries
the concept's direction instead. Two forms, both after SAEBench, without gradients through the language model:

- full: all main latents are silent, and the latent with the largest projection onto the probe's direction, with a
  cosine of at least 0.025, carries at least 0.4 of the whole activation's projection.
- fraction: of what main latents and up to three others (cosine at least 0.1, together at least 0.4 of the whole)
  project, the share of the others, who are counted only for what the main latents leave missing.

Projections are taken from the mean of the activations that lack the concept, so that a large mean of all activations
does not count as the concept. With a tree of concepts there is a third number that needs no probe: the share of a
child's tokens on which the parent's best latent fires, for each child. Concepts whose probe has an F1 below 0.6 are
left out and counted. A latent can be silent only if it exists: an SAE that has not learnt a concept has low F1 of its
main latents, and its absorption then means little; and a latent that fires everywhere fires on every child. So the F1
and the share of other tokens on which the best latent fires are shown beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.utils import logging

from hf_msae.evaluation.labelled import Encoder, LabelledActivations, encoder_of
from hf_msae.evaluation.metric import Details, Evaluation, Metric, MetricInputs, Plot, Table
from hf_msae.evaluation.plots import draw_lines, legend_outside, log_axis, mean_at
from hf_msae.evaluation.probes import MIN_TEST, Samples, Split, mean_differences
from hf_msae.evaluation.splitting import main_latents
from hf_msae.evaluation.tables import Column, field_at_prefix, table_by_prefix
from hf_msae.modeling import MatryoshkaSAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_PROBE_F1 = 0.6
FULL_COSINE, FRACTION_COSINE = 0.025, 0.1
MIN_SHARE = 0.4
MAX_ABSORBERS = 3


@dataclass(frozen=True)
class ConceptAbsorption:
    """One concept at one prefix.

    Args:
        concept: its name.
        prefix: latents in the prefix.
        probe_f1: of the probe on the whole activation.
        tokens: test examples that have the concept and whose probe is right.
        main: the concept's main latents, the best first.
        main_f1: of a probe on the main latents.
        full: share of the tokens with full absorption, in [0, 1].
        fraction: mean absorbed fraction over the tokens, in [0, 1].
        recalls: for each child with enough examples, the share of them on which the best latent fires.
        elsewhere: the share of the examples that lack the concept on which the best latent fires.
    """

    concept: str
    prefix: int
    probe_f1: float
    tokens: int
    main: list[int]
    main_f1: float
    full: float
    fraction: float
    recalls: dict[str, float]
    elsewhere: float


@dataclass(frozen=True)
class LevelAbsorption:
    """Means over the concepts of one prefix, for one split of the data.

    Args:
        prefix: latents in the prefix.
        split: the seed of the split.
        concepts: how many were looked at.
        refused: how many were left out for want of a good probe.
        tokens: test examples behind the absorption numbers.
        probe_f1: of the probes on whole activations.
        main_f1: of probes on the main latents.
        split_latents: mean number of main latents.
        full: mean share of tokens with full absorption.
        fraction: mean absorbed fraction.
        child_recall: mean recall of the best latent over all children; None without a tree.
        worst_child: mean over concepts of the least recall among their children; None without a tree.
        elsewhere: the best latent's share of the examples that lack the concept, without which recall means nothing.
    """

    prefix: int
    split: int
    concepts: int
    refused: int
    tokens: int
    probe_f1: float
    main_f1: float
    split_latents: float
    full: float
    fraction: float
    child_recall: float | None
    worst_child: float | None
    elsewhere: float


@dataclass(frozen=True)
class AbsorptionResult:
    """Absorption of one SAE.

    Args:
        levels: means by level and split.
        concepts: the concepts of the first split one by one.
    """

    levels: list[LevelAbsorption]
    concepts: list[ConceptAbsorption]


def measure_absorption(
    data: LabelledActivations, sae: MatryoshkaSAE, splits: Sequence[Split]
) -> tuple[list[LevelAbsorption], list[ConceptAbsorption]]:
    """Absorption at every prefix and split, and the first split's concepts one by one.

    Args:
        data: labelled examples.
        sae: in evaluation mode.
        splits: divisions of the documents, from `make_split`.

    Returns:
        Means by split and prefix, and the concepts of the first split.
    """
    levels: list[LevelAbsorption] = []
    details: list[ConceptAbsorption] = []
    for split in splits:
        chosen, refused = choose_concepts(data, split)
        found = _measure_split(data, sae, split, chosen)
        details = details or found
        for prefix in sae.config.prefix_sizes:
            of_level = [item for item in found if item.prefix == prefix]
            if of_level:
                levels.append(_summarise(prefix, split.seed, of_level, refused))
    return levels, details


def choose_concepts(data: LabelledActivations, split: Split) -> tuple[list[int], int]:
    """The concepts to look at, and how many were refused.

    These are the concepts with at least two children (all, where there is no tree), with enough examples and a good
    probe.

    Args:
        data: labelled examples.
        split: whose examples and probes count.

    Returns:
        Numbers of concepts, and how many were left out.
    """
    general = [number for number, name in enumerate(data.names) if not data.parents or len(data.children(name)) > 1]
    fit = [number for number in general if split.usable[number] and split.scores.f1[number] >= MIN_PROBE_F1]
    return fit, len(general) - len(fit)


def _summarise(prefix: int, seed: int, found: Sequence[ConceptAbsorption], refused: int) -> LevelAbsorption:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    recalls = [list(item.recalls.values()) for item in found if item.recalls]
    return LevelAbsorption(
        prefix=prefix,
        split=seed,
        concepts=len(found),
        refused=refused,
        tokens=sum(item.tokens for item in found),
        probe_f1=mean([item.probe_f1 for item in found]),
        main_f1=mean([item.main_f1 for item in found]),
        split_latents=mean([len(item.main) for item in found]),
        full=mean([item.full for item in found]),
        fraction=mean([item.fraction for item in found]),
        child_recall=mean([mean(values) for values in recalls]) if recalls else None,
        worst_child=mean([min(values) for values in recalls]) if recalls else None,
        elsewhere=mean([item.elsewhere for item in found]),
    )


@torch.inference_mode()
def _measure_split(
    data: LabelledActivations, sae: MatryoshkaSAE, split: Split, chosen: Sequence[int]
) -> list[ConceptAbsorption]:
    encode, at_once = encoder_of(sae)
    differences = mean_differences(data, encode, at_once, split)[chosen]
    train, test = split.train.of(chosen), split.test.of(chosen)
    main, main_f1 = {}, {}
    for prefix in sae.config.prefix_sizes if chosen else ():
        main[prefix], main_f1[prefix] = main_latents(data, encode, at_once, train, test, differences[:, :prefix])
    cosines = normalize(sae.W_dec.float().cpu(), dim=1)
    results = []
    for place, concept in enumerate(chosen):
        rows = _positive_rows(split, concept)
        latents = data.features_of(encode, rows)
        without = data.features_of(encode, _negative_rows(split.test, concept)) > 0
        children = _child_latents(data, encode, split, concept)
        direction = normalize(split.probes.direction[concept].float(), dim=0)
        projections = latents * (sae.W_dec.float().cpu() @ direction)
        whole = data.raw[rows] @ direction - _projection_without(data, split, concept, direction)
        right = data.raw[rows] @ split.probes.direction[concept].float() + split.probes.bias[concept] > 0
        for prefix in sae.config.prefix_sizes:
            mine = main[prefix][place]
            full, fraction = absorption_of(
                latents[right, :prefix], projections[right, :prefix], whole[right], cosines[:prefix] @ direction, mine
            )
            results.append(
                ConceptAbsorption(
                    concept=data.names[concept],
                    prefix=prefix,
                    probe_f1=split.scores.f1[concept].item(),
                    tokens=int(right.sum()),
                    main=mine,
                    main_f1=main_f1[prefix][place].item(),
                    full=full,
                    fraction=fraction,
                    recalls={name: (found[:, mine[0]] > 0).double().mean().item() for name, found in children.items()},
                    elsewhere=without[:, mine[0]].double().mean().item(),
                )
            )
    return results


def _positive_rows(split: Split, concept: int) -> Tensor:
    half = split.test.rows.shape[1] // 2
    real = split.test.weights[concept, :half] > 0
    return split.test.rows[concept, :half][real]


def _negative_rows(samples: Samples, concept: int) -> Tensor:
    half = samples.rows.shape[1] // 2
    return samples.rows[concept, half:][samples.weights[concept, half:] > 0]


def _projection_without(data: LabelledActivations, split: Split, concept: int, direction: Tensor) -> Tensor:
    """Mean projection of the training examples that lack the concept."""
    return (data.raw[_negative_rows(split.train, concept)] @ direction).mean()


def _child_latents(data: LabelledActivations, encode: Encoder, split: Split, concept: int) -> dict[str, Tensor]:
    """Latents of each child's test examples, of which there are enough."""
    found = {}
    for child in data.children(data.names[concept]):
        rows = _positive_rows(split, list(data.names).index(child))
        if len(rows) >= MIN_TEST:
            found[child] = data.features_of(encode, rows)
    return found


def absorption_of(
    latents: Tensor, projections: Tensor, whole: Tensor, cosines: Tensor, main: Sequence[int]
) -> tuple[float, float]:
    """Full and fractional absorption of a concept over examples that have it.

    Args:
        latents: activations of the latents, (n, m).
        projections: of each latent's part of the reconstruction onto the probe's unit direction, (n, m).
        whole: the activation's own projection, (n,).
        cosines: of decoder rows with the direction, (m,).
        main: numbers of the main latents.

    Returns:
        The share of examples with full absorption, and the mean absorbed fraction; 0 for no examples.
    """
    if not len(latents):
        return 0.0, 0.0
    others = projections.clone()
    others[:, main] = 0.0
    floor = whole.clamp_min(1e-12)
    silent = (latents[:, main] <= 0).all(1)
    strongest = others.masked_fill(cosines < FULL_COSINE, 0.0).max(1).values
    full = silent & (strongest / floor >= MIN_SHARE)
    of_main = projections[:, main].sum(1).clamp_min(0)
    eligible = others.masked_fill(cosines < FRACTION_COSINE, 0.0).clamp_min(0)
    absorbers = eligible.topk(min(MAX_ABSORBERS, eligible.shape[1]), dim=1).values.sum(1)
    absorbed = torch.minimum(absorbers, (whole - of_main).clamp_min(0))
    absorbed = absorbed.masked_fill(absorbers / floor < MIN_SHARE, 0.0)
    share = absorbed / (absorbed + of_main).clamp_min(1e-12)
    return full.double().mean().item(), share.double().mean().item()


class AbsorptionMetric(Metric[dict[str, AbsorptionResult]]):
    """Splitting and absorption at each prefix, by the SAE's name."""

    name = "absorption"
    needs_labels = True

    def measure(self, inputs: MetricInputs) -> dict[str, AbsorptionResult]:
        """Measure every SAE on the same splits."""
        return {
            name: AbsorptionResult(*measure_absorption(inputs.examples, sae, inputs.splits))
            for name, sae in logging.tqdm(inputs.saes.items(), desc="Absorption", unit=" SAE")
        }

    def tables(self, result: dict[str, AbsorptionResult], evaluation: Evaluation) -> list[Table]:
        """One of methods at prefixes; its note says so where no concept can be looked at."""
        title = "Splitting and absorption"
        levels = [level for found in result.values() for level in found.levels]
        if not levels:
            note = (
                "Refused: no concept has a probe on the whole activation with an F1 of at least 0.6 and examples "
                "enough."
            )
            return [Table(title, note, [], [])]
        first = levels[0]
        note = (
            f"Means over {first.concepts} general concepts (probe F1 {first.probe_f1:.2f} on the whole activation; "
            f"{first.refused} refused for a probe F1 below 0.6 or too few examples), {first.tokens:,} tokens. Main "
            "F1 is that of a probe on the concept's own latents: low absorption at a low main F1 only says that the "
            "concept was not learnt. The last three columns: the share of a child's tokens on which the parent's "
            "best latent fires, and of tokens of other concepts."
        )
        found = {name: absorption.levels for name, absorption in result.items()}
        columns = [
            Column("main F1", field_at_prefix(found, "main_f1")),
            Column("latents per concept", field_at_prefix(found, "split_latents"), 2),
            Column("absorbed (full)", field_at_prefix(found, "full")),
            Column("absorbed (fraction)", field_at_prefix(found, "fraction")),
            Column("fires on children", field_at_prefix(found, "child_recall")),
            Column("on the worst child", field_at_prefix(found, "worst_child")),
            Column("fires elsewhere", field_at_prefix(found, "elsewhere")),
        ]
        return [table_by_prefix(evaluation, title, note, columns)]

    def plots(self, result: dict[str, AbsorptionResult], evaluation: Evaluation) -> list[Plot]:
        """What is absorbed, and how often parents fire on their children, by prefix."""
        if not any(found.levels for found in result.values()):
            return []
        return [
            Plot(
                "What other latents absorb, and how often a parent's best latent fires on its children, by prefix.",
                lambda figure: _draw(result, evaluation, figure),
            )
        ]

    def details(self, result: dict[str, AbsorptionResult], evaluation: Evaluation) -> Details | None:
        """The concepts of the SAE that is evaluated one by one, with its whole dictionary."""
        name, found = next(iter(result.items()))
        widest = max((item.prefix for item in found.concepts), default=0)
        concepts = [item for item in found.concepts if item.prefix == widest and item.recalls]
        if not concepts:
            return None
        return Details(
            "Concept by concept",
            "Concept by concept: does the parent's latent fire on each child?",
            Path(__file__).with_name("absorption.html"),
            {"sae": evaluation.facts.get("sae", name), "concepts": concepts},
        )


def _draw(result: dict[str, AbsorptionResult], evaluation: Evaluation, figure: "Figure") -> None:
    titles = {
        "fraction": "absorbed fraction (lower is better)",
        "full": "fully absorbed",
        "child_recall": "fires on children",
    }
    has_children = all(level.child_recall is not None for found in result.values() for level in found.levels)
    fields = ("fraction", "child_recall" if has_children else "full")
    for field, axis in zip(fields, figure.subplots(1, 2), strict=True):
        points = {name: mean_at(found.levels, "prefix", field) for name, found in result.items()}
        draw_lines(axis, evaluation, points.__getitem__)
        axis.set(xlabel="prefix", title=titles[field])
        log_axis(axis, next(iter(evaluation.prefix_sizes.values())))
        axis.set_ylim(0, 1 if field == "child_recall" else None)
    legend_outside(figure.axes[1])
