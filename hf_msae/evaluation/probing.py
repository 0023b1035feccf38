"""Sparse probing: how well a concept can be read off a few latents (Gurnee et al., arXiv:2305.01610; SAEBench).

For each concept the k features whose means with and without it differ most are put into a logistic regression, and its
accuracy is taken on balanced examples from other documents. Single latents that carry whole concepts do well at k = 1.
The number means something only beside others: the same k dimensions of the raw activation, k principal components, and
latents of an SAE that was never trained; and the probe on the whole activation, which bounds what can be read at all.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_msae.evaluation.labelled import Encoder, LabelledActivations, encoder_of
from hf_msae.evaluation.metric import Evaluation, Metric, MetricInputs, Plot, Table
from hf_msae.evaluation.plots import TEXT, draw_lines, legend_outside, log_axis, mean_at
from hf_msae.evaluation.probes import Split, fit_probes, mean_differences, score_logits, training_examples
from hf_msae.evaluation.tables import Cells, Column, table_by_prefix, write_cell
from hf_msae.modeling import MatryoshkaSAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KS = (1, 2, 5)
TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class ProbingScore:
    """Quality of probes on k features of one prefix, a mean over concepts, for one split of the data.

    Args:
        features: whose they are, an SAE's name or that of a reference.
        prefix: how many features there are to choose from.
        k: how many were chosen; equal to `prefix` where all were used.
        split: the seed of the split.
        accuracy: balanced; 0.5 is chance.
        f1: on the test examples.
    """

    features: str
    prefix: int
    k: int
    split: int
    accuracy: float
    f1: float


@dataclass(frozen=True)
class ProbingResult:
    """All scores, and what they were measured on.

    Args:
        scores: by split, features, prefix and k.
        concepts: usable in every split.
        by_concept: by the SAE's name the accuracy of each concept at the smallest k with the whole dictionary, a mean
            over splits.
        train_examples: mean number of training examples of a concept.
        test_examples: mean number of test examples of a concept.
        description: of the examples, for people.
    """

    scores: list[ProbingScore]
    concepts: list[str]
    by_concept: dict[str, list[float]]
    train_examples: float
    test_examples: float
    description: str


def measure_probing(
    data: LabelledActivations, saes: Mapping[str, MatryoshkaSAE], splits: Sequence[Split], ks: Sequence[int] = KS
) -> ProbingResult:
    """Probe every SAE at every prefix, and the references, on the same splits.

    Args:
        data: labelled examples.
        saes: by name, in evaluation mode.
        splits: divisions of the documents.
        ks: how many features a probe reads.
    """
    scores: list[ProbingScore] = []
    by_concept: dict[str, list[Tensor]] = {}
    for split in splits:
        hidden_size = data.x.shape[1]
        whole = (split.scores.accuracy[split.usable].mean().item(), split.scores.f1[split.usable].mean().item())
        scores.append(ProbingScore("whole activation", hidden_size, hidden_size, split.seed, *whole))
        for name, encode in reference_features(data, split).items():
            scores += _probe(data, name, encode, TOKENS_AT_ONCE, [hidden_size], split, ks)[0]
        for name, sae in saes.items():
            found, of_concepts = _probe(data, name, *encoder_of(sae), sae.config.prefix_sizes, split, ks)
            scores += found
            by_concept.setdefault(name, []).append(of_concepts)
    shared = torch.stack([split.usable for split in splits]).all(0)
    return ProbingResult(
        scores=scores,
        concepts=[name for name, kept in zip(data.names, shared.tolist(), strict=True) if kept],
        by_concept={name: torch.stack(found).mean(0)[shared].tolist() for name, found in by_concept.items()},
        train_examples=splits[0].train.counts[splits[0].usable].double().mean().item(),
        test_examples=splits[0].test.counts[splits[0].usable].double().mean().item(),
        description=data.description,
    )


def reference_features(data: LabelledActivations, split: Split) -> dict[str, Encoder]:
    """What an SAE's latents are compared with, made without test examples.

    Args:
        data: labelled examples.
        split: whose training examples count.

    Returns:
        By name, what gives features of activations.
    """
    return {
        "activation dimensions": lambda x: x,
        "principal components": _principal_components(_training_activations(data, split)),
    }


def _training_activations(data: LabelledActivations, split: Split) -> Tensor:
    """The activations (n, hidden_size) of all training examples' tokens."""
    training = training_examples(data, split)
    return data.x[training if data.example_of is None else training[data.example_of]]


def _principal_components(x: Tensor) -> Encoder:
    doubles = x.double()
    mean = doubles.mean(0)
    centred = doubles - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    components, origin = vectors.flip(1).float(), mean.float()
    return lambda part: (part - origin) @ components


def choose_features(
    data: LabelledActivations, encode: Encoder, at_once: int, split: Split, prefixes: Sequence[int], count: int
) -> dict[int, Tensor]:
    """For each prefix the features that differ most with and without each usable concept on training examples.

    Args:
        data: labelled examples.
        encode: gives features of activations.
        at_once: tokens to encode together.
        split: whose training examples count.
        prefixes: numbers of first features to choose from.
        count: how many to choose.

    Returns:
        By prefix, the largest difference first, (num_usable, at most count) int64.
    """
    differences = mean_differences(data, encode, at_once, split).abs()[split.usable]
    return {prefix: differences[:, :prefix].topk(min(count, prefix), dim=1).indices for prefix in prefixes}


def _probe(
    data: LabelledActivations,
    name: str,
    encode: Encoder,
    at_once: int,
    prefixes: Sequence[int],
    split: Split,
    ks: Sequence[int],
) -> tuple[list[ProbingScore], Tensor]:
    """Scores of every prefix and k, and each concept's accuracy at the last prefix with the smallest k."""
    usable = split.usable.nonzero().flatten().tolist()
    train, test = split.train.of(usable), split.test.of(usable)
    tops = choose_features(data, encode, at_once, split, prefixes, max(ks))
    columns = torch.cat([top.flatten() for top in tops.values()]).unique()
    features = data.features(encode, at_once, columns)
    scores, of_concepts = [], torch.zeros(data.num_concepts, dtype=torch.float64)
    for prefix, top in tops.items():
        places = torch.searchsorted(columns, top)
        for k in [k for k in ks if k <= prefix]:
            probes = fit_probes(features, train, places[:, :k])
            found = score_logits(probes.logits(features, test), test)
            means = (found.accuracy.mean().item(), found.f1.mean().item())
            scores.append(ProbingScore(name, prefix, k, split.seed, *means))
            if k == min(ks):
                of_concepts[usable] = found.accuracy
    return scores, of_concepts


class ProbingMetric(Metric[ProbingResult]):
    """Accuracy of probes on a few latents of each prefix, beside probes on other features."""

    name = "probing"
    takes_transcoders = True
    needs_labels = True

    def measure(self, inputs: MetricInputs) -> ProbingResult:
        """Probe every SAE on the same splits."""
        return measure_probing(inputs.examples, inputs.saes, inputs.splits)

    def tables(self, result: ProbingResult, evaluation: Evaluation) -> list[Table]:
        """One of methods at prefixes, and one of what probes reach without an SAE."""

        def of(k: int) -> Callable[[str, int], Cells]:
            def values(name: str, prefix: int) -> Cells:
                return [s.accuracy for s in result.scores if (s.features, s.prefix, s.k) == (name, prefix, k)]

            return values

        note = (
            "Accuracy of probes on the k latents of a prefix that differ most with a concept, mean over "
            f"{len(result.concepts)} concepts; 0.5 is chance. {result.description}; {result.train_examples:.0f} "
            f"examples of a concept to train on, {result.test_examples:.0f} to test on, from other documents. The "
            "next table has what a probe reaches without an SAE."
        )
        columns = [Column(f"k = {k}", of(k)) for k in _ks(result, evaluation)]
        return [
            table_by_prefix(evaluation, "Sparse probing", note, columns),
            _reference_table(result, _references(result, evaluation)),
        ]

    def plots(self, result: ProbingResult, evaluation: Evaluation) -> list[Plot]:
        """Accuracy by prefix, for the smallest and the largest k."""
        return [
            Plot(
                "Probes on k latents by prefix; dashed lines are features without an SAE.",
                lambda figure: _draw(result, evaluation, figure),
            )
        ]


def _ks(result: ProbingResult, evaluation: Evaluation) -> list[int]:
    return sorted({score.k for score in result.scores if score.features in evaluation.methods})


def _references(result: ProbingResult, evaluation: Evaluation) -> list[str]:
    """Names of the features that are no SAE's."""
    return list(dict.fromkeys(s.features for s in result.scores if s.features not in evaluation.methods))


def _reference_table(result: ProbingResult, names: Sequence[str]) -> Table:
    rows = []
    for name in names:
        of = [score for score in result.scores if score.features == name]
        for k in sorted({score.k for score in of}):
            rows.append([name, f"{k:,}", write_cell([score.accuracy for score in of if score.k == k], 3)])
    note = "The same concepts, examples and probes on other features. The whole activation bounds what can be read."
    return Table("Sparse probing, references", note, ["features", "k", "accuracy"], rows)


def _draw(result: ProbingResult, evaluation: Evaluation, figure: "Figure") -> None:
    ks = _ks(result, evaluation)
    for k, axis in zip([ks[0], ks[-1]], figure.subplots(1, 2, sharey=True), strict=True):
        scores = {name: [s for s in result.scores if (s.features, s.k) == (name, k)] for name in evaluation.methods}
        points = {name: mean_at(of, "prefix", "accuracy") for name, of in scores.items()}
        draw_lines(axis, evaluation, points.__getitem__)
        for number, name in enumerate(_references(result, evaluation)):
            of = [s.accuracy for s in result.scores if s.features == name and s.k in (k, s.prefix)]
            if of:
                dashes = (0, (4 + 2 * number, 2 + number))
                axis.axhline(statistics.fmean(of), color=TEXT, alpha=0.7, linewidth=1, linestyle=dashes, label=name)
        axis.set(xlabel="prefix", title=f"k = {k}")
        log_axis(axis, next(iter(evaluation.prefix_sizes.values())))
    figure.axes[0].set_ylabel("balanced accuracy")
    legend_outside(figure.axes[1])
