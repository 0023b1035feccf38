"""SynthSAEBench's world obeys its closed forms, and detection is what its definitions say."""

import math
from dataclasses import replace

import pytest
import torch
from synth_worlds import SMALL, make_sae

from hf_msae.research.detection import measure_detection
from hf_msae.research.toys import SynthBenchSettings, SynthBenchWorld
from hf_msae.research.toys.synth_bench import pushed_apart, zipf_probabilities

pytestmark = pytest.mark.slow

INDEPENDENT = replace(SMALL, correlation_scale=0.0)
SAMPLES = 60_000


@pytest.fixture(scope="module")
def independent() -> tuple[SynthBenchWorld, torch.Tensor]:
    world = SynthBenchWorld(INDEPENDENT)
    return world, world.sample(SAMPLES, torch.Generator().manual_seed(0)).features


def test_the_full_world_is_the_papers():
    settings = SynthBenchSettings()
    assert settings.level_sizes == [128, 512, 2048, 8192]
    assert settings.num_in_trees == 10_880
    assert (settings.num_features, settings.hidden_size) == (16_384, 768)
    assert (SMALL.num_features, SMALL.hidden_size, SMALL.num_trees) == (512, 24, 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_trees": 40}, r"40 trees of 85 features are more than num_features=512"),
        ({"probabilities": (0.1, 0.2)}, r"\(largest, smallest\)"),
        ({"branching": 1}, "branching must be at least 2"),
        ({"hidden_size": 0}, "at least one feature and one dimension"),
    ],
)
def test_worlds_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        replace(SMALL, **changes)


def test_zipfs_law_meets_its_ends():
    law = zipf_probabilities(1000, 0.5, 0.4, 5e-4)
    assert (law[0].item(), law[-1].item()) == (pytest.approx(0.4), pytest.approx(5e-4))
    middle = (100**-0.5 - 1000**-0.5) / (1 - 1000**-0.5)
    assert law[99].item() == pytest.approx(5e-4 + (0.4 - 5e-4) * middle)


def test_features_fire_as_often_as_the_closed_form_says(independent):
    world, features = independent
    expected = world.probabilities
    found = (features > 0).double().mean(0)
    deviation = (expected * (1 - expected) / SAMPLES).sqrt()
    z = (found - expected) / deviation
    assert z.abs().max() < 5
    assert z.square().mean() == pytest.approx(1, abs=0.35)
    assert found.sum().item() == pytest.approx(world.l0, rel=0.01)


def test_what_parents_and_siblings_take_is_made_up_for_as_in_the_source():
    world = SynthBenchWorld(INDEPENDENT)
    parent, children = world.zipf[1].item(), world.zipf[8:12].tolist()
    for place, mine in enumerate(children):
        factor = (1 + (sum(children) - mine) / parent) / parent
        assert world.raised[8 + place].item() == pytest.approx(min(1, mine * factor))
    assert torch.equal(world.raised[:4], world.zipf[:4])
    assert torch.equal(world.raised[340:], world.zipf[340:])


def test_children_fire_one_at_a_time_and_only_with_their_parent(independent):
    world, features = independent
    fires, parents = features > 0, world.parents
    assert (parents >= 0).sum() == 4 * (4 + 16 + 64)
    children = (parents >= 0).nonzero().flatten()
    assert not (fires[:, children] & ~fires[:, parents[children]]).any()
    assert torch.equal(parents[children].unique(return_counts=True)[1], torch.full((4 * 21,), 4))
    siblings = torch.zeros(SAMPLES, 512).index_add_(1, parents[children], fires[:, children].float())
    assert siblings.max() == 1


def test_strengths_have_their_mean_and_spread_and_children_their_parents(independent):
    world, features = independent
    for feature in (0, 3, 340, 400):  # roots, and features outside the trees
        values = features[features[:, feature] > 0, feature].double()
        mean, spread = world.magnitudes[feature].item(), world.spreads[feature].item()
        error = 5 * spread / math.sqrt(len(values))
        assert values.mean().item() == pytest.approx(mean, abs=error + 1e-3)
    child = 4
    both = features[:, child] > 0
    of_child, of_parent = features[both, child].double(), features[both, 0].double()
    ratio = of_child / (of_parent / world.magnitudes[0].item())
    assert ratio.mean().item() == pytest.approx(world.magnitudes[child].item(), abs=0.1)
    assert torch.corrcoef(torch.stack([ratio, of_parent]))[0, 1].abs() < 0.1


def test_features_are_correlated_as_their_factors_say():
    """Of two features outside the trees, the normal numbers' covariance gives how often both fire."""
    settings = replace(SMALL, num_trees=0, correlation_scale=0.18, probabilities=(0.3, 0.2), spread=(0.01, 0.0))
    world = SynthBenchWorld(settings)
    covariance = world.factor @ world.factor.T
    assert (world.factor.square().sum(1) <= 0.99 + 1e-5).all()
    covariance.fill_diagonal_(0)
    one, two = divmod(int(covariance.abs().argmax()), settings.num_features)
    fires = world.sample(SAMPLES, torch.Generator().manual_seed(1)).features > 0
    both = (fires[:, one] & fires[:, two]).double().mean().item()
    generator = torch.Generator().manual_seed(2)
    normal = torch.randn(2, 2_000_000, generator=generator, dtype=torch.float64)
    rho = covariance[one, two].item()
    second = rho * normal[0] + math.sqrt(1 - rho**2) * normal[1]
    borders = [torch.special.ndtri(1 - world.zipf[feature]).item() for feature in (one, two)]
    expected = ((normal[0] > borders[0]) & (second > borders[1])).double().mean().item()
    assert abs(rho) > 0.2
    assert both == pytest.approx(expected, abs=5 * math.sqrt(expected / SAMPLES))


def test_activations_are_their_features_directions_and_the_bias(independent):
    world, _ = independent
    samples = world.sample(100, torch.Generator().manual_seed(3))
    torch.testing.assert_close(samples.x, world.bias + samples.features @ world.directions)
    assert world.bias.norm().item() == pytest.approx(0.5)
    again = SynthBenchWorld(INDEPENDENT).sample(100, torch.Generator().manual_seed(3))
    assert torch.equal(again.x, samples.x)


def test_directions_are_pushed_apart_by_the_gradient_of_their_cosines():
    rows = torch.nn.functional.normalize(torch.randn(60, 12, generator=torch.Generator().manual_seed(0)))
    plain = rows.clone().requires_grad_()
    optimizer = torch.optim.Adam([plain], lr=1e-2)
    for _ in range(5):
        products = plain @ plain.T
        own = products.diagonal()
        loss = (products - torch.diag(own)).square().sum() + 60 * (own - 1).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = torch.nn.functional.normalize(plain.detach())
    torch.testing.assert_close(pushed_apart(rows, 5, 1e-2), expected, rtol=1e-4, atol=1e-5)
    off = lambda w: (w @ w.T - torch.eye(60)).square().sum()  # noqa: E731
    assert off(pushed_apart(rows, 50, 1e-2)) < off(rows)
    assert torch.equal(pushed_apart(rows, 0, 1e-2), torch.nn.functional.normalize(rows))


# Detection


def test_the_truth_detects_everything():
    settings = SynthBenchSettings(num_features=20, hidden_size=64, num_trees=1, depth=1, orthogonal_steps=0)
    world = SynthBenchWorld(settings)
    world.directions = torch.linalg.qr(torch.randn(64, 20, generator=torch.Generator().manual_seed(0))).Q.T
    batches = [world.sample(5000, torch.Generator().manual_seed(seed)) for seed in range(3)]
    found = measure_detection(make_sae(world, world.directions, 1e-3), world.directions, batches)
    assert (found.f1, found.mcc, found.uniqueness) == (pytest.approx(1), pytest.approx(1), 1)
    assert (found.dead, found.fve) == (0, pytest.approx(1))
    assert found.l0 == pytest.approx(found.true_l0)
    assert found.shrinkage == pytest.approx(1, abs=1e-4)


def test_detection_is_what_its_definitions_say(independent):
    """Also with latents that point the other way, stand for the same feature, or never fire."""
    world, _ = independent
    generator = torch.Generator().manual_seed(5)
    rows = torch.nn.functional.normalize(world.directions[:30] + 0.1 * torch.randn(30, 24, generator=generator))
    rows[3], rows[4] = -rows[3], rows[5]
    sae = make_sae(world, rows, 2.0)
    sae.threshold[7] = 1e9
    batches = [world.sample(2000, torch.Generator().manual_seed(seed)) for seed in (6, 7)]
    found = measure_detection(sae, world.directions, batches)
    x, features = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("x", "features"))
    fires, cosines = sae.encode(x) > 0, (rows @ world.directions.T).abs()
    scores = []
    for latent in range(30):
        truth = features[:, int(cosines[latent].argmax())] > 0
        both = (fires[:, latent] & truth).sum().item()
        precision = both / max(1, fires[:, latent].sum().item())
        recall = both / max(1, truth.sum().item())
        f1 = 2 * precision * recall / (precision + recall) if both else 0.0
        scores.append((f1, precision, recall))
    expected = torch.tensor(scores).mean(0).tolist()
    assert [found.f1, found.precision, found.recall] == pytest.approx(expected, rel=1e-5)
    assert found.uniqueness == len(set(cosines.argmax(1).tolist())) / 30
    assert found.dead == (~fires.any(0)).double().mean().item() > 0
    assert found.true_l0 == pytest.approx((features > 0).sum(1).double().mean().item())
    lengths = (sae.decode(sae.encode(x)).norm(dim=1) / x.norm(dim=1)).mean().item()
    assert found.shrinkage == pytest.approx(lengths, rel=1e-4)


def test_no_samples_are_refused(independent):
    world, _ = independent
    with pytest.raises(ValueError, match="no samples"):
        measure_detection(make_sae(world, world.directions[:8]), world.directions, [])
