"""SynthSAEBench's world and metrics beside those of `sae_lens.synthetic`: the same law, the same numbers.

Skipped where SAELens is absent; `make peers` has it.
"""

from dataclasses import replace

import pytest
import torch
from synth_worlds import SMALL, make_sae

from hf_msae.research.detection import measure_detection
from hf_msae.research.toys import Samples, SynthBenchWorld
from hf_msae.research.toys.synth_bench import pushed_apart

synthetic = pytest.importorskip("sae_lens.synthetic", reason="needs sae-lens: make peers")
pytestmark = pytest.mark.peer

SAMPLES = 60_000
SETTINGS = replace(SMALL, orthogonal_steps=3, orthogonal_rate=1e-2)


@pytest.fixture(scope="module")
def theirs():
    settings = SETTINGS
    largest, smallest = settings.probabilities
    start, end = settings.magnitudes
    mean, deviation = settings.spread
    torch.manual_seed(0)
    return synthetic.SyntheticModel(
        synthetic.SyntheticModelConfig(
            num_features=settings.num_features,
            hidden_dim=settings.hidden_size,
            firing_probability=synthetic.ZipfianFiringProbabilityConfig(
                exponent=settings.exponent, max_prob=largest, min_prob=smallest
            ),
            hierarchy=synthetic.HierarchyConfig(
                total_root_nodes=settings.num_trees,
                branching_factor=settings.branching,
                max_depth=settings.depth,
                mutually_exclusive_portion=1.0,
                compensate_probabilities=True,
                scale_children_by_parent=True,
            ),
            orthogonalization=synthetic.OrthogonalizationConfig(
                num_steps=settings.orthogonal_steps, lr=settings.orthogonal_rate
            ),
            correlation=synthetic.LowRankCorrelationConfig(
                rank=settings.correlation_rank, correlation_scale=settings.correlation_scale
            ),
            mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(start=start, end=end),
            std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(mean=mean, std=deviation),
            bias=settings.bias,
            seed=settings.seed,
        )
    )


@pytest.fixture(scope="module")
def ours(theirs) -> SynthBenchWorld:
    """Our world with what they drew once: spreads, factors, directions."""
    world, generator = SynthBenchWorld(SETTINGS), theirs.activation_generator
    world.directions, world.bias = theirs.feature_dict.feature_vectors.detach(), theirs.feature_dict.bias.detach()
    world.spreads = generator.std_firing_magnitudes
    world.factor, world._own = generator.low_rank_correlation
    return world


def test_what_is_not_drawn_is_equal(theirs, ours):
    generator = theirs.activation_generator
    torch.testing.assert_close(ours.raised.float(), generator.firing_probabilities, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.magnitudes, generator.mean_firing_magnitudes)
    torch.testing.assert_close(ours._border, generator.correlation_thresholds, rtol=1e-3, atol=1e-4)
    assert ours.bias.norm().item() == pytest.approx(SETTINGS.bias, rel=1e-5)
    theirs_of = {
        child.feature_index: node.feature_index
        for root in theirs.hierarchy.roots
        for node in _walk(root)
        for child in node.children
    }
    assert {row: parent for row, parent in enumerate(ours.parents.tolist()) if parent >= 0} == theirs_of


def _walk(node):
    yield node
    for child in node.children:
        yield from _walk(child)


def test_directions_are_pushed_apart_as_theirs():
    rows = torch.nn.functional.normalize(torch.randn(70, 12, generator=torch.Generator().manual_seed(0)))
    from sae_lens.synthetic.feature_dictionary import orthogonalize_embeddings

    theirs = orthogonalize_embeddings(rows, num_steps=5, lr=1e-2, chunk_size=32)
    torch.testing.assert_close(pushed_apart(rows, 5, 1e-2), theirs, rtol=1e-4, atol=1e-5)


def test_what_is_drawn_has_the_same_statistics(theirs, ours):
    torch.manual_seed(1)
    there = torch.cat([theirs.activation_generator.sample(10_000) for _ in range(SAMPLES // 10_000)])
    here = ours.sample(SAMPLES, torch.Generator().manual_seed(2)).features
    rates = [(sample > 0).double().mean(0) for sample in (there, here)]
    deviation = (sum(rate * (1 - rate) for rate in rates) / SAMPLES).sqrt().clamp_min(1e-5)
    z = (rates[0] - rates[1]) / deviation
    assert z.abs().max() < 5.5
    assert z.square().mean().item() == pytest.approx(1, abs=0.35)
    counts = [(sample > 0).double().sum(1) for sample in (there, here)]
    assert counts[0].mean().item() == pytest.approx(counts[1].mean().item(), rel=0.01)
    assert counts[0].std().item() == pytest.approx(counts[1].std().item(), rel=0.02)
    often = (rates[0] > 0.005).nonzero().flatten()
    for power in (1, 2):
        means = [(sample[:, often].double() ** power).mean(0) for sample in (there, here)]
        torch.testing.assert_close(*means, rtol=0.25, atol=0)
        assert means[0].sum().item() == pytest.approx(means[1].sum().item(), rel=0.01)


def test_metrics_of_the_same_sae_on_the_same_samples_are_equal(ours):
    from sae_lens.synthetic import evals

    generator = torch.Generator().manual_seed(5)
    rows = torch.nn.functional.normalize(ours.directions[:60] + 0.1 * torch.randn(60, 24, generator=generator))
    rows[3], rows[4] = -rows[3], rows[5]
    sae = make_sae(ours, rows, 2.0)
    sae.threshold[7] = 1e9
    samples = ours.sample(20_000, torch.Generator().manual_seed(6))
    found = measure_detection(sae, ours.directions, [Samples(samples.x[:7000], samples.features[:7000])] * 2)
    x, features = samples.x[:7000], samples.features[:7000]
    with torch.no_grad():
        latents = sae.encode(x)
        scores = evals.compute_classification_metrics(latents, features, sae.W_dec, ours.directions)
        shrinkage = evals.ShrinkageCalculator()
        shrinkage.add_batch(sae.decode(latents), x)
        dead = evals.DeadLatentsCalculator(60)
        dead.add_batch(latents)
        mcc = evals.mean_correlation_coefficient(sae.W_dec, ours.directions)
        unique = evals.feature_uniqueness(sae.W_dec, ours.directions)
    assert found.f1 == pytest.approx(scores.f1_score, rel=1e-5)
    assert found.precision == pytest.approx(scores.precision, rel=1e-5)
    assert found.recall == pytest.approx(scores.recall, rel=1e-5)
    assert found.mcc == pytest.approx(mcc, rel=1e-5)
    assert found.uniqueness == pytest.approx(unique)
    assert found.shrinkage == pytest.approx(shrinkage.compute(), rel=1e-4)
    assert found.dead == pytest.approx(dead.compute() / 60)
