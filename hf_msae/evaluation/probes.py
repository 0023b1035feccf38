"""Linear probes: balanced samples of labelled examples, and logistic regression for many concepts at once.

Every concept is probed on as many examples that have it as lack it, so 0.5 is chance. What lacks it expresses some
other concept: telling an owl from a comma would be too easy. Training and test examples come from different documents.

The regression is scikit-learn's (standardised columns, L2 penalty with C = 1, no penalty on the bias), solved by
Newton's method for all concepts together, which takes a few small steps where a loop over concepts takes thousands.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_msae.errors import InputError
from hf_msae.evaluation.labelled import Encoder, LabelledActivations

MAX_TRAIN, MAX_TEST = 300, 200
MIN_TEST = 20
TEST_SHARE = 0.3
NEWTON_STEPS, MAX_HALVINGS = 30, 20
# Relative change of the loss. Newton's method doubles the digits with every step, so the rest is far below it.
TOLERANCE = 1e-7
NUMBERS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Samples:
    """Rows of examples for each concept: the first half of the columns have it, the second half lack it.

    Args:
        rows: numbers of examples, (num_concepts, n) int64.
        weights: (num_concepts, n) float64; zero where a row is only a filler, and each half sums to half the number of
            real rows.
    """

    rows: Tensor
    weights: Tensor

    @property
    def targets(self) -> Tensor:
        """1 in the first half, 0 in the second, (n,) float64."""
        half = self.rows.shape[1] // 2
        return torch.cat([torch.ones(half), torch.zeros(half)]).double()

    @property
    def counts(self) -> Tensor:
        """Real rows of each concept, (num_concepts,)."""
        return (self.weights > 0).sum(1)

    def of(self, concepts: Sequence[int]) -> "Samples":
        """The samples of some concepts.

        Args:
            concepts: their numbers.
        """
        return Samples(self.rows[concepts], self.weights[concepts])


def draw_samples(data: LabelledActivations, seed: int) -> tuple[Samples, Samples]:
    """Training and test samples, from different documents.

    Args:
        data: labelled examples.
        seed: of the division of the documents, and of which examples are taken.
    """
    generator = torch.Generator().manual_seed(seed)
    documents = data.document_of.unique()
    shuffled = documents[torch.randperm(len(documents), generator=generator)]
    in_test = torch.isin(data.document_of, shuffled[: max(1, round(TEST_SHARE * len(documents)))])
    return _draw(data, ~in_test, MAX_TRAIN, generator), _draw(data, in_test, MAX_TEST, generator)


def _draw(data: LabelledActivations, usable: Tensor, limit: int, generator: torch.Generator) -> Samples:
    labelled = data.labels.any(1)
    rows = torch.zeros(data.num_concepts, 2 * limit, dtype=torch.int64)
    weights = torch.zeros(data.num_concepts, 2 * limit, dtype=torch.float64)
    for concept in range(data.num_concepts):
        has = data.labels[:, concept]
        halves = [(has & usable).nonzero().flatten(), (labelled & ~has & usable).nonzero().flatten()]
        count = min(limit, *map(len, halves))
        for start, found in zip((0, limit), halves, strict=True):
            rows[concept, start : start + count] = found[torch.randperm(len(found), generator=generator)[:count]]
            weights[concept, start : start + count] = 1.0
    return Samples(rows, weights)


@dataclass(frozen=True)
class Probes:
    """Linear probes; logits are `features @ direction + bias`.

    Args:
        direction: (num_concepts, width) float64.
        bias: (num_concepts,) float64.
        columns: which features each concept's probe reads, (num_concepts, width); None where all probes read all.
    """

    direction: Tensor
    bias: Tensor
    columns: Tensor | None = None

    def logits(self, features: Tensor, samples: Samples) -> Tensor:
        """Logits of each concept's own samples.

        Args:
            features: of all examples, (num_examples, width).
            samples: of the same concepts.

        Returns:
            (num_concepts, n) float64.
        """
        parts = []
        for concepts in _parts(self.direction, samples):
            x = _gather(features, samples, self.columns, concepts)
            parts.append(torch.einsum("cnk,ck->cn", x, self.direction[concepts]) + self.bias[concepts, None])
        return torch.cat(parts)


def _parts(width_of: Tensor, samples: Samples) -> list[slice]:
    """Concepts, in parts whose features fit in memory together."""
    at_once = max(1, NUMBERS_AT_ONCE // (samples.rows.shape[1] * max(1, width_of.shape[-1])))
    return [slice(start, start + at_once) for start in range(0, len(samples.rows), at_once)]


def _gather(features: Tensor, samples: Samples, columns: Tensor | None, concepts: slice) -> Tensor:
    """(concepts, n, width) float64."""
    rows = samples.rows[concepts]
    return (features[rows] if columns is None else features[rows[:, :, None], columns[concepts, None, :]]).double()


def fit_probes(features: Tensor, samples: Samples, columns: Tensor | None = None) -> Probes:
    """Logistic regression of each concept.

    Concepts without examples get zeros. Columns that do not vary get the coefficient zero.

    Args:
        features: of all examples, (num_examples, width).
        samples: to train on.
        columns: the features that each concept's probe reads, (num_concepts, k); by default all.
    """
    fits = [
        _fit(_gather(features, samples, columns, concepts), samples.weights[concepts], samples.targets)
        for concepts in _parts(features if columns is None else columns, samples)
    ]
    return Probes(torch.cat([direction for direction, _ in fits]), torch.cat([bias for _, bias in fits]), columns)


def _fit(x: Tensor, weights: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    total = weights.sum(1).clamp_min(1)[:, None]
    mean = torch.einsum("cn,cnk->ck", weights, x) / total
    spread = (torch.einsum("cn,cnk->ck", weights, (x - mean[:, None]).pow(2)) / total).sqrt()
    scale = torch.where(spread > 1e-12, spread, torch.inf)
    columns = torch.cat([(x - mean[:, None]) / scale[:, None], torch.ones_like(x[..., :1])], -1)
    solution = _newton(columns, weights, targets)
    direction = solution[:, :-1] / scale
    return direction, solution[:, -1] - (direction * mean).sum(1)


def _newton(columns: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
    """Minimise weighted logistic loss + half the squared coefficients but the last, for each concept, (C, width)."""
    width = columns.shape[-1]
    penalty = torch.ones(width, dtype=torch.float64)
    penalty[-1] = 0.0
    # A concept without examples would have a singular system.
    ridge = torch.diag(penalty + 1e-9)
    solution = columns.new_zeros(len(columns), width)

    def loss_of(candidate: Tensor) -> Tensor:
        logits = torch.einsum("cnk,ck->cn", columns, candidate)
        losses = torch.nn.functional.softplus(logits) - targets * logits
        return (weights * losses).sum(1) + 0.5 * (penalty * candidate.pow(2)).sum(1)

    loss = loss_of(solution)
    # The curvature only shapes the step, and is most of the work.
    singles = columns.float()
    for _ in range(NEWTON_STEPS):
        p = torch.einsum("cnk,ck->cn", columns, solution).sigmoid()
        gradient = torch.einsum("cnk,cn->ck", columns, weights * (p - targets)) + penalty * solution
        curved = singles * (weights * p * (1 - p)).float()[..., None]
        step = torch.linalg.solve((curved.mT @ singles).double() + ridge, gradient)
        # A full step can overshoot where classes are nearly separable; then it is halved, for that concept alone.
        for _ in range(MAX_HALVINGS):
            candidate_loss = loss_of(solution - step)
            worse = candidate_loss > loss * (1 + TOLERANCE)
            if not worse.any():
                break
            step[worse] /= 2
        step[worse] = 0
        gain = (loss - candidate_loss).max()
        solution, loss = solution - step, torch.minimum(loss, candidate_loss)
        if gain <= TOLERANCE * loss.mean():
            break
    return solution


@dataclass(frozen=True)
class Scores:
    """Quality of probes on a balanced test sample.

    Args:
        accuracy: (num_concepts,) float64.
        f1: (num_concepts,) float64.
    """

    accuracy: Tensor
    f1: Tensor


def score_logits(logits: Tensor, samples: Samples) -> Scores:
    """Accuracy and F1 on the real rows of a sample.

    Args:
        logits: (num_concepts, n).
        samples: that the logits are of.
    """
    guess, real, positive = logits > 0, samples.weights > 0, samples.targets.bool()
    counts = samples.counts.clamp_min(1)
    right = ((guess == positive) & real).sum(1)
    true_positives = (guess & positive & real).sum(1)
    flagged = (guess & real).sum(1)
    f1 = 2 * true_positives / (flagged + counts / 2).clamp_min(1)
    return Scores((right / counts).double(), f1.double())


@dataclass(frozen=True)
class Split:
    """One division of the documents into training and test documents.

    Args:
        seed: of the division.
        train: training samples.
        test: test samples.
        usable: which concepts have enough of both, (num_concepts,) bool.
        probes: on whole activations.
        scores: of these probes on the test samples.
    """

    seed: int
    train: Samples
    test: Samples
    usable: Tensor
    probes: Probes
    scores: Scores


def make_split(data: LabelledActivations, seed: int) -> Split:
    """Draw samples, and fit probes on whole activations.

    Args:
        data: labelled examples.
        seed: of the division.

    Raises:
        InputError: no concept has examples enough on both sides.
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


def training_examples(data: LabelledActivations, split: Split) -> Tensor:
    """Which examples any concept's probe is trained on.

    Args:
        data: labelled examples.
        split: whose training samples count.

    Returns:
        (num_examples,) bool.
    """
    training = torch.zeros(data.num_examples, dtype=torch.bool)
    training[split.train.rows[split.train.weights > 0]] = True
    return training


def mean_differences(data: LabelledActivations, encode: Encoder, at_once: int, split: Split) -> Tensor:
    """Mean with the concept − mean without it of every feature, on training examples.

    Args:
        data: labelled examples.
        encode: gives features of activations.
        at_once: tokens to encode together.
        split: whose training samples count.

    Returns:
        (num_concepts, width) float64.
    """
    with_it, without_it = data.class_means(encode, at_once, training_examples(data, split))
    return with_it - without_it
