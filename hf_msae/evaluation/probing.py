"""Sparse probing: how well a concept can be read off a few latents (Gurnee et al., arXiv:2305.01610; SAEBench).

For each concept the k features whose means with and without it differ most are put into a logistic regression, and its
accuracy is taken on balanced examples from other documents. Single latents that carry whole concepts do well at k = 1.
The number means something only beside others: the same k dimensions of the raw activation, k principal components, and
latents of an SAE that was never trained; and the probe on the whole activation, which bounds what can be read at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_msae.errors import InputError
from hf_msae.evaluation.labelled import Encoder, LabelledActivations, encoder_of
from hf_msae.evaluation.probes import Probes, Samples, Scores, draw_samples, fit_probes, score_logits
from hf_msae.modeling import MatryoshkaSAE

KS = (1, 2, 5)
MIN_TEST = 20
TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class ProbingScore:
    """Balanced accuracy and F1 of probes on k features of one prefix, means over concepts, for one split of the data.

    `prefix` is the number of features to choose from, and `k` how many were chosen; equal where all were used.
    """

    features: str
    prefix: int
    k: int
    split: int
    accuracy: float
    f1: float


@dataclass(frozen=True)
class ProbingResult:
    """All scores, and what they were measured on: the mean number of training and test examples of a concept.

    `by_concept` holds the accuracy of each concept at k = 1 with each SAE's whole dictionary, a mean over splits.
    """

    scores: list[ProbingScore]
    concepts: list[str]
    by_concept: dict[str, list[float]]
    train_examples: float
    test_examples: float
    description: str


@dataclass(frozen=True)
class Split:
    """One division of the documents: samples, which concepts have enough of them, and probes on whole activations."""

    seed: int
    train: Samples
    test: Samples
    usable: Tensor
    probes: Probes
    scores: Scores


def make_split(data: LabelledActivations, seed: int) -> Split:
    """Draw samples, and fit probes on whole activations.

    Raises `ValueError` where no concept has examples enough on both sides.
    """
    train, test = draw_samples(data, seed)
    usable = (train.counts >= 2 * MIN_TEST) & (test.counts >= 2 * MIN_TEST)
    if not usable.any():
        raise InputError(
            f"{data.description}: no concept has {MIN_TEST} examples for training and as many for testing; use more "
            "labelled documents."
        )
    probes = fit_probes(data.raw, train)
    return Split(seed, train, test, usable, probes, score_logits(probes.logits(data.raw, test), test))


def measure_probing(
    data: LabelledActivations, saes: Mapping[str, MatryoshkaSAE], splits: Sequence[Split], ks: Sequence[int] = KS
) -> ProbingResult:
    """Probe every SAE at every prefix, and the references, on the same splits."""
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
    """What an SAE's latents are compared with, made without test examples."""
    return {
        "activation dimensions": lambda x: x,
        "principal components": _principal_components(_training_activations(data, split)),
    }


def _training_activations(data: LabelledActivations, split: Split) -> Tensor:
    """The activations (n, hidden_size) of all training examples' tokens."""
    training = _training_examples(data, split)
    return data.x[training if data.example_of is None else training[data.example_of]]


def _training_examples(data: LabelledActivations, split: Split) -> Tensor:
    """Which examples any concept's probe is trained on, (num_examples,) bool."""
    training = torch.zeros(data.num_examples, dtype=torch.bool)
    training[split.train.rows[split.train.weights > 0]] = True
    return training


def _principal_components(x: Tensor) -> Encoder:
    doubles = x.double()
    mean = doubles.mean(0)
    centred = doubles - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    components, origin = vectors.flip(1).float(), mean.float()
    return lambda part: (part - origin) @ components


def mean_differences(data: LabelledActivations, encode: Encoder, at_once: int, split: Split) -> Tensor:
    """Mean with the concept − mean without it of every feature, (num_concepts, width), on training examples."""
    with_it, without_it = data.class_means(encode, at_once, _training_examples(data, split))
    return with_it - without_it


def choose_features(
    data: LabelledActivations, encode: Encoder, at_once: int, split: Split, prefixes: Sequence[int], count: int
) -> dict[int, Tensor]:
    """For each prefix the features among the first ones that differ most with and without each usable concept on
    training examples, the largest difference first, (num_usable, at most count).
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
