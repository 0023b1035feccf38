"""Targeted concept erasure: what ablating a concept's latents does to probes of this concept and of others.

Two scores of SAEBench (Karvonen et al., arXiv:2503.09532; SHIFT, arXiv:2403.19647), both with a warning: a later study
(arXiv:2605.18229) found them unreliable across seeds and against ground truth. They are here because the Matryoshka
paper reports them. Latents are ranked by (mean with the concept − mean without) · (decoder row · probe), and the first
n are set to zero while the SAE's error stays, which moves the activation by −Σ f_j d_j and a linear probe's logit by
−Σ f_j ⟨d_j, w⟩. So no forward pass is needed.

- TPP (targeted probe perturbation): ablate the latents of class i, and take the drop of class i's probe in accuracy
  minus the mean drop of the others'. 0.5 is all that a balanced probe can lose.
- SCR (spurious correlation removal): a probe of A is trained where A and B always go together, so it reads B too.
  Ablating B's latents should bring it to the accuracy of a probe trained on balanced data: (ablated − biased) /
  (balanced − biased). Pairs for which the bias costs less than 0.05 of accuracy say nothing and are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils import logging

from hf_msae.evaluation.labelled import LabelledActivations, encoder_of
from hf_msae.evaluation.metric import Evaluation, Metric, MetricInputs, Plot, Table
from hf_msae.evaluation.plots import Point, draw_lines, legend_outside, log_axis, mean_at
from hf_msae.evaluation.probes import Probes, Samples, Split, fit_probes, mean_differences, score_logits
from hf_msae.evaluation.tables import Column, field_at_prefix, table_by_prefix
from hf_msae.modeling import MatryoshkaSAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUNTS = (2, 5, 10, 20, 50)
# Which of them the table shows.
SHOWN_COUNT = 10
MIN_CLASSES = 3
MAX_CLASSES = 12
MIN_BIAS = 0.05
CELL_TRAIN, CELL_TEST = 100, 50
MIN_CELL = 15


@dataclass(frozen=True)
class PerturbationScore:
    """TPP at one prefix, a mean over classes.

    Args:
        prefix: latents in the prefix.
        count: latents ablated per class.
        split: the seed of the split.
        classes: how many.
        score: `intended` − `unintended`.
        intended: drop in accuracy of the probe of the class whose latents are ablated.
        unintended: mean drop of the other probes.
    """

    prefix: int
    count: int
    split: int
    classes: int
    score: float
    intended: float
    unintended: float


@dataclass(frozen=True)
class RemovalScore:
    """SCR at one prefix, a mean over pairs of labels.

    Args:
        prefix: latents in the prefix.
        count: latents ablated.
        split: the seed of the split.
        pairs: how many.
        score: (ablated − biased) / (balanced − biased).
        biased: accuracy on balanced data of probes trained on biased data.
        ablated: the same with the spurious label's latents ablated.
        balanced: accuracy of probes trained on balanced data.
    """

    prefix: int
    count: int
    split: int
    pairs: int
    score: float
    biased: float
    ablated: float
    balanced: float


@dataclass(frozen=True)
class ErasureResult:
    """Erasure of one SAE.

    Args:
        perturbation: TPP by split, prefix and number of ablated latents.
        removal: SCR by the same; empty where there are no documents with several labels.
        pairs_left_out: pairs of labels for which the bias costs too little, in the first split of SCR.
    """

    perturbation: list[PerturbationScore]
    removal: list[RemovalScore]
    pairs_left_out: int


def choose_classes(data: LabelledActivations, split: Split) -> list[int]:
    """Roots of the tree (labels, where there is none) with enough examples, the most frequent ones.

    Args:
        data: labelled examples.
        split: whose examples and probes count.

    Returns:
        Numbers of concepts.
    """
    able = [
        number
        for number, name in enumerate(data.names)
        if name not in data.parents and split.usable[number] and split.scores.f1[number] > 0.6
    ]
    return sorted(able, key=lambda number: -int(data.labels[:, number].sum()))[:MAX_CLASSES]


@torch.inference_mode()
def measure_perturbation(
    data: LabelledActivations, sae: MatryoshkaSAE, splits: Sequence[Split], counts: Sequence[int] = COUNTS
) -> list[PerturbationScore]:
    """TPP at every prefix.

    Args:
        data: labelled examples.
        sae: in evaluation mode.
        splits: divisions of the documents.
        counts: how many latents to ablate per class.

    Returns:
        Scores; none of a split in which fewer than three classes can be probed.
    """
    scores: list[PerturbationScore] = []
    encode, _ = encoder_of(sae)
    for split in splits:
        classes = choose_classes(data, split)
        if len(classes) < MIN_CLASSES:
            continue
        weights = sae.W_dec.double().cpu() @ split.probes.direction[classes].T
        orders = order_latents(data, sae, split, classes)
        before = split.scores.accuracy[classes]
        drops = {
            (prefix, count): torch.zeros(len(classes), len(classes), dtype=torch.float64)
            for prefix in sae.config.prefix_sizes
            for count in counts
        }
        for place, concept in enumerate(classes):
            latents = data.features_of(encode, split.test.rows[concept]).double()
            contributions = latents * weights[:, place]
            logits = split.probes.direction[concept] @ data.raw[split.test.rows[concept]].double().T
            logits = logits + split.probes.bias[concept]
            sample = Samples(split.test.rows[concept][None], split.test.weights[concept][None])
            for prefix, count in drops:
                taken = orders[prefix][:, :count]
                moved = logits - contributions[:, taken].sum(-1).T
                after = torch.stack([score_logits(row[None], sample).accuracy[0] for row in moved])
                drops[prefix, count][:, place] = (before[place] - after).clamp_min(0)
        for (prefix, count), table in drops.items():
            intended = table.diagonal().mean().item()
            unintended = (table.sum() - table.diagonal().sum()).item() / (len(classes) * (len(classes) - 1))
            scores.append(
                PerturbationScore(prefix, count, split.seed, len(classes), intended - unintended, intended, unintended)
            )
    return scores


def order_latents(
    data: LabelledActivations, sae: MatryoshkaSAE, split: Split, classes: Sequence[int]
) -> dict[int, Tensor]:
    """For each prefix its latents in the order in which they are ablated for each class.

    The order is by how much a latent rises with the class on training examples, times what it writes along the probe.

    Args:
        data: labelled examples.
        sae: in evaluation mode.
        split: whose training examples and probes count.
        classes: numbers of concepts.

    Returns:
        By prefix, (num_classes, prefix) int64.
    """
    rises = mean_differences(data, *encoder_of(sae), split)[classes].clamp_min(0).double()
    effects = rises * (sae.W_dec.double().cpu() @ split.probes.direction[classes].T).T
    return {prefix: effects[:, :prefix].argsort(dim=1, descending=True) for prefix in sae.config.prefix_sizes}


@dataclass(frozen=True)
class Pair:
    """A label A and a spurious one B, with samples of a single concept each.

    Args:
        biased: training samples of A where B goes along with it.
        balanced: training samples of A where B does not.
        of_spurious: training samples of B.
        test: test samples of A.
    """

    biased: Samples
    balanced: Samples
    of_spurious: Samples
    test: Samples


@torch.inference_mode()
def measure_removal(
    data: LabelledActivations, sae: MatryoshkaSAE, seeds: Sequence[int], counts: Sequence[int] = COUNTS
) -> tuple[list[RemovalScore], int]:
    """SCR at every prefix, over all ordered pairs of labels that are not each other's opposite.

    Args:
        data: documents with several independent labels.
        sae: in evaluation mode.
        seeds: of the splits.
        counts: how many latents to ablate.

    Returns:
        Scores, and how many pairs the first split leaves out.
    """
    encode, at_once = encoder_of(sae)
    latents = data.features(encode, at_once).double()
    decoder = sae.W_dec.double().cpu()
    scores: list[RemovalScore] = []
    left_out = 0
    for seed in seeds:
        found: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
        pairs = draw_pairs(data, seed)
        for pair in pairs:
            biased, balanced = fit_probes(data.raw, pair.biased), fit_probes(data.raw, pair.balanced)
            base = _accuracy(biased.logits(data.raw, pair.test), pair.test)
            best = _accuracy(balanced.logits(data.raw, pair.test), pair.test)
            if best - base < MIN_BIAS:
                left_out += seed == seeds[0]
                continue
            effects = spurious_effects(latents, decoder, pair.of_spurious, fit_probes(data.raw, pair.of_spurious))
            for prefix in sae.config.prefix_sizes:
                order = effects[:prefix].argsort(descending=True)
                for count in counts:
                    after = _ablated_accuracy(data, biased, latents, decoder, order[:count], pair.test)
                    found.setdefault((prefix, count), []).append((base, after, best))
        for (prefix, count), results in found.items():
            share = sum((after - base) / (best - base) for base, after, best in results) / len(results)
            base, after, best = (sum(values) / len(results) for values in zip(*results, strict=True))
            scores.append(RemovalScore(prefix, count, seed, len(results), share, base, after, best))
    return scores, left_out


def spurious_effects(latents: Tensor, decoder: Tensor, sample: Samples, probe: Probes) -> Tensor:
    """How far each latent moves a probe of one label between examples that have the label and those that lack it.

    Args:
        latents: of all examples, (num_examples, num_latents).
        decoder: rows, (num_latents, hidden_size).
        sample: the training sample of the label, a single concept.
        probe: of the label.

    Returns:
        (num_latents,).
    """
    rows, half = sample.rows[0], sample.rows.shape[1] // 2
    difference = latents[rows[:half]].mean(0) - latents[rows[half:]].mean(0)
    return (difference * (decoder @ probe.direction[0])).abs()


def _accuracy(logits: Tensor, sample: Samples) -> float:
    return score_logits(logits, sample).accuracy.item()


def _ablated_accuracy(
    data: LabelledActivations, probe: Probes, latents: Tensor, decoder: Tensor, ablated: Tensor, test: Samples
) -> float:
    moved = latents[test.rows[0]][:, ablated] @ (decoder[ablated] @ probe.direction[0])
    return _accuracy(probe.logits(data.raw, test) - moved, test)


def draw_pairs(data: LabelledActivations, seed: int) -> list[Pair]:
    """Every ordered pair of labels whose four combinations all have enough documents.

    Args:
        data: documents with several independent labels.
        seed: of which documents are taken.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for one in range(data.num_concepts):
        for two in range(data.num_concepts):
            pair = None if one == two else _draw_pair(data, one, two, generator)
            if pair is not None:
                pairs.append(pair)
    return pairs


def _draw_pair(data: LabelledActivations, one: int, two: int, generator: torch.Generator) -> Pair | None:
    has_one, has_two = data.labels[:, one], data.labels[:, two]
    cells = []
    for first, second in ((has_one, has_two), (has_one, ~has_two), (~has_one, has_two), (~has_one, ~has_two)):
        rows = (first & second).nonzero().flatten()
        cells.append(rows[torch.randperm(len(rows), generator=generator)])
    smallest = min(map(len, cells))
    test = min(CELL_TEST, smallest // 3)
    train = min(CELL_TRAIN, smallest - test) // 2 * 2
    if test < MIN_CELL or train < MIN_CELL:
        return None
    both, only_one, only_two, neither = (cell[test : test + train] for cell in cells)
    half = train // 2

    def sample(*parts: Tensor) -> Samples:
        rows = torch.cat(parts)[None]
        return Samples(rows, torch.ones_like(rows, dtype=torch.float64))

    return Pair(
        biased=sample(both, neither),
        balanced=sample(both[:half], only_one[:half], only_two[:half], neither[:half]),
        of_spurious=sample(both[:half], only_two[:half], only_one[:half], neither[:half]),
        test=sample(*(cell[:test] for cell in cells)),
    )


class ErasureMetric(Metric[dict[str, ErasureResult]]):
    """TPP and SCR at each prefix, by the SAE's name."""

    name = "erasure"
    needs_labels = True

    def measure(self, inputs: MetricInputs) -> dict[str, ErasureResult]:
        """Measure every SAE on the same splits; SCR only where there are documents with several labels."""
        result = {}
        for name, sae in logging.tqdm(inputs.saes.items(), desc="Erasure", unit=" SAE"):
            removal: tuple[list[RemovalScore], int] = ([], 0)
            if inputs.of_documents is not None:
                removal = measure_removal(inputs.of_documents, sae, [split.seed for split in inputs.splits])
            result[name] = ErasureResult(measure_perturbation(inputs.examples, sae, inputs.splits), *removal)
        return result

    def tables(self, result: dict[str, ErasureResult], evaluation: Evaluation) -> list[Table]:
        """One of methods at prefixes, with the scores at one number of ablated latents."""
        perturbation = {name: _at_shown_count(erasure.perturbation) for name, erasure in result.items()}
        removal = {name: _at_shown_count(erasure.removal) for name, erasure in result.items()}
        columns = [
            Column("TPP", field_at_prefix(perturbation, "score")),
            Column("intended", field_at_prefix(perturbation, "intended")),
            Column("unintended", field_at_prefix(perturbation, "unintended")),
            Column("SCR", field_at_prefix(removal, "score")),
            Column("biased acc.", field_at_prefix(removal, "biased")),
            Column("ablated acc.", field_at_prefix(removal, "ablated")),
            Column("balanced acc.", field_at_prefix(removal, "balanced")),
        ]
        first = next(iter(result.values()))
        classes = first.perturbation[0].classes if first.perturbation else 0
        pairs = first.removal[0].pairs if first.removal else 0
        note = (
            f"With {SHOWN_COUNT} latents ablated per concept; TPP over {classes} classes, SCR over {pairs} pairs of "
            f"labels ({first.pairs_left_out} left out because the bias cost too little). The Matryoshka paper reports "
            "them; arXiv:2605.18229 found them unreliable across seeds: do not rest a claim on them."
        )
        return [table_by_prefix(evaluation, "Targeted concept erasure", note, columns)]

    def plots(self, result: dict[str, ErasureResult], evaluation: Evaluation) -> list[Plot]:
        """TPP by the number of latents ablated."""
        if not any(found.perturbation for found in result.values()):
            return []
        return [
            Plot(
                "TPP by the number of latents ablated, whole dictionaries.",
                lambda figure: _draw(result, evaluation, figure),
            )
        ]


def _at_shown_count(scores: Sequence[PerturbationScore | RemovalScore]) -> list[PerturbationScore | RemovalScore]:
    return [score for score in scores if score.count == SHOWN_COUNT]


def _draw(result: dict[str, ErasureResult], evaluation: Evaluation, figure: "Figure") -> None:
    axis = figure.subplots()

    def points(name: str) -> list[Point]:
        widest = evaluation.prefix_sizes[name][-1]
        return mean_at([s for s in result[name].perturbation if s.prefix == widest], "count", "score")

    draw_lines(axis, evaluation, points)
    axis.set(xlabel="latents ablated per class", ylabel="TPP")
    log_axis(axis, COUNTS)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    legend_outside(axis)
