"""Probes against scikit-learn, and samples by counting."""

import pytest
import torch

from hf_msae.evaluation.labelled import LabelledActivations
from hf_msae.evaluation.probes import MAX_TEST, MAX_TRAIN, Samples, draw_samples, fit_probes, score_logits


def make_samples(labels: torch.Tensor) -> Samples:
    """All rows of (n,) labels as one concept's sample, filled up where one side has fewer."""
    sides = [labels.nonzero().flatten(), (~labels).nonzero().flatten()]
    half = max(map(len, sides))
    rows, weights = torch.zeros(1, 2 * half, dtype=torch.int64), torch.zeros(1, 2 * half, dtype=torch.float64)
    for start, side in zip((0, half), sides, strict=True):
        rows[0, start : start + len(side)] = side
        weights[0, start : start + len(side)] = 1
    return Samples(rows, weights)


@pytest.mark.parametrize(("scale", "shift", "separation"), [(1.0, 0.0, 1.0), (1e3, 500.0, 0.3), (1.0, 0.0, 30.0)])
def test_probes_are_scikit_learns_logistic_regression(scale, shift, separation):
    linear = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn (extra: test)")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator)
    labels = (separation * x[:, 0] + torch.randn(300, generator=generator)) > 0.2
    x = x * scale + shift
    probes = fit_probes(x, make_samples(labels))
    standardised = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    theirs = linear.LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(standardised, labels.numpy())
    ours = (probes.direction[0] * x.std(0, correction=0)).numpy()
    assert ours == pytest.approx(theirs.coef_[0], rel=2e-3, abs=2e-3)
    logits = probes.logits(x, make_samples(labels))
    expected = torch.from_numpy(theirs.decision_function(standardised))[make_samples(labels).rows[0]]
    real = make_samples(labels).weights[0] > 0
    assert torch.allclose(logits[0][real], expected[real], rtol=5e-3, atol=5e-3)


def test_the_gradient_vanishes_at_the_solution():
    """Needs no other library: standardised columns, penalty 1/2, no penalty on the bias."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 4, generator=generator).double()
    labels = (x[:, 1] - x[:, 2] + torch.randn(200, generator=generator)) > 0
    samples = make_samples(labels)
    probes = fit_probes(x.float(), samples)
    scale = x.std(0, correction=0)
    coefficients = probes.direction[0] * scale
    p = (x @ probes.direction[0] + probes.bias[0]).sigmoid()
    errors = p - labels.double()
    gradient = ((x - x.mean(0)) / scale).T @ errors + coefficients
    assert gradient.abs().max() < 0.01
    assert errors.sum().abs() < 0.01


def test_many_concepts_are_fitted_as_each_alone():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(120, 5, generator=generator)
    each = [make_samples(x[:, column] > 0) for column in range(3)]
    size = max(sample.rows.shape[1] for sample in each)

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        half = tensor.shape[1] // 2
        parts = (tensor[:, :half], tensor[:, half:])
        return torch.cat([torch.nn.functional.pad(part, (0, size // 2 - half)) for part in parts], 1)

    together = Samples(torch.cat([padded(s.rows) for s in each]), torch.cat([padded(s.weights) for s in each]))
    columns = torch.tensor([[0, 4], [1, 4], [2, 3]])
    found = fit_probes(x, together, columns)
    for concept, sample in enumerate(each):
        alone = fit_probes(x, sample, columns[concept : concept + 1])
        assert torch.allclose(found.direction[concept], alone.direction[0], atol=1e-4)
        assert found.bias[concept] == pytest.approx(alone.bias[0].item(), abs=1e-4)
        scores = score_logits(alone.logits(x, sample), sample)
        assert scores.accuracy.item() > 0.9


def test_a_constant_column_gets_no_weight_and_a_concept_without_examples_no_probe():
    x = torch.randn(40, 2)
    x[:, 1] = 7.0
    sample = make_samples(x[:, 0] > 0)
    empty = Samples(torch.cat([sample.rows, sample.rows]), torch.cat([sample.weights, 0 * sample.weights]))
    probes = fit_probes(x, empty)
    assert probes.direction[0, 1] == 0
    assert probes.direction[0, 0] > 0
    assert probes.direction[1].tolist() == [0, 0]
    assert probes.bias[1] == 0


def test_scores_by_counting():
    sample = Samples(torch.arange(8)[None], torch.tensor([[1, 1, 1, 0, 1, 1, 1, 0]]).double())
    logits = torch.tensor([[1.0, 1, -1, -9, 1, -1, -1, 9]])
    scores = score_logits(logits, sample)
    assert scores.accuracy.item() == pytest.approx(4 / 6)
    assert scores.f1.item() == pytest.approx(2 * 2 / (3 + 3))


def test_samples_are_balanced_and_split_by_document():
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(6000, 3, dtype=torch.bool)
    labels[torch.arange(6000), torch.randint(4, (6000,), generator=generator).clamp(max=2)] = True
    labels[::5] = False  # tokens without any concept
    documents = torch.arange(6000) // 40
    data = LabelledActivations(torch.randn(6000, 4), labels, ["a", "b", "c"], documents, "made up")
    train, test = draw_samples(data, seed=3)
    for samples, limit in ((train, MAX_TRAIN), (test, MAX_TEST)):
        half = samples.rows.shape[1] // 2
        for concept in range(3):
            real = samples.weights[concept] > 0
            assert real[:half].sum() == real[half:].sum() == limit
            rows = samples.rows[concept]
            assert labels[rows[:half], concept].all()
            assert not labels[rows[half:], concept].any()
            assert labels[rows].any(1).all()
            assert len(rows.unique()) == len(rows)
    assert not set(documents[train.rows.flatten()].tolist()) & set(documents[test.rows.flatten()].tolist())
    again = draw_samples(data, seed=3)
    assert torch.equal(train.rows, again[0].rows)
    assert not torch.equal(train.rows, draw_samples(data, seed=4)[0].rows)
