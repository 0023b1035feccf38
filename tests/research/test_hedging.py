"""The hedging degree on planted drift, and on narrow SAEs of features that do or do not come together."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.evaluation.activations import TextActivations
from hf_msae.research.hedging import hedging_degree, measure_hedging, widen
from hf_msae.sites import Site

pytestmark = pytest.mark.slow

LATENTS, WIDTH, NEW = 50, 64, 6


@pytest.fixture
def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit rows of a control, six new rows, and unit vectors within their span, one a latent."""
    generator = torch.Generator().manual_seed(0)
    control = normalize(torch.randn(LATENTS, WIDTH, generator=generator, dtype=torch.float64), dim=1)
    new = torch.randn(NEW, WIDTH, generator=generator, dtype=torch.float64)
    inside = normalize(torch.randn(LATENTS, NEW, generator=generator, dtype=torch.float64) @ new, dim=1)
    return control, new, inside


def test_drift_within_the_new_span_is_hedging(parts):
    control, new, inside = parts
    found = hedging_degree(torch.cat([control + 0.3 * inside, new]), control)
    assert found.projection == pytest.approx(0.3, abs=1e-9)
    assert found.drift == pytest.approx(0.3, abs=1e-9)
    # A random subspace of 6 of 64 dimensions holds a part √(6/64) of a vector's length, a little less in the mean.
    assert found.baseline == pytest.approx(0.3 * math.sqrt(NEW / WIDTH), rel=0.1)
    assert found.degree == pytest.approx((0.3 - found.baseline) / (1 - found.baseline))
    assert (found.prefix, found.num_new) == (LATENTS, NEW)
    assert 0 < found.baseline_spread < 0.04


def test_drift_elsewhere_is_none(parts):
    control, new, _ = parts
    generator = torch.Generator().manual_seed(1)
    drift = 0.3 * normalize(torch.randn(LATENTS, WIDTH, generator=generator, dtype=torch.float64), dim=1)
    basis = torch.linalg.qr(new.T).Q
    outside = hedging_degree(torch.cat([control + drift - drift @ basis @ basis.T, new]), control)
    assert (outside.projection, outside.degree) == (pytest.approx(0, abs=1e-9), 0)
    assert hedging_degree(torch.cat([control + drift, new]), control).degree < 0.02
    still = hedging_degree(torch.cat([control, new]), control)
    assert (still.degree, still.drift) == (0, 0)


def test_names_scales_and_rotations_do_not_matter(parts):
    control, new, inside = parts
    extended = control + 0.3 * inside
    found = hedging_degree(extended, control, new=new)
    order = torch.randperm(LATENTS, generator=torch.Generator().manual_seed(2))
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)).double()).Q
    again = hedging_degree(5 * extended[order] @ rotation, 5 * control[order] @ rotation, new=new.flip(0) @ rotation)
    assert again.projection == pytest.approx(found.projection, abs=1e-9)
    assert again.degree == pytest.approx(found.degree, abs=0.02)


def test_new_rows_that_repeat_each_other_span_less(parts):
    control, new, inside = parts
    twice = torch.cat([new[:1], 2 * new[:1]])
    found = hedging_degree(control + 0.3 * inside, control, new=twice)
    along = normalize(new[:1], dim=1)
    assert found.projection == pytest.approx((0.3 * inside @ along.T).abs().mean().item(), abs=1e-9)


def test_a_span_of_everything_is_refused(parts):
    control, *_ = parts
    with pytest.raises(ValueError, match=r"from 1 to 63 new rows .* of the width of the control's \(50, 64\)"):
        hedging_degree(control, control)
    with pytest.raises(ValueError, match="with 64 new ones"):
        hedging_degree(torch.cat([control, torch.eye(64)]), control)


def made(x: torch.Tensor) -> TextActivations:
    return TextActivations(None, Site("made"), [], 0, 1, x, "made")


def test_a_wider_sae_begins_with_the_same_latents():
    torch.manual_seed(0)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=8, num_latents=12, prefix_sizes=[4, 12], k=2)).eval()
    with torch.no_grad():
        sae.threshold.fill_(0.3)
        sae.b_enc.normal_(std=0.1)
    wider = widen(sae, 5).eval()
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    assert wider.config.prefix_sizes == [4, 17]
    assert torch.equal(wider.encode(x)[:, :12], sae.encode(x))
    torch.testing.assert_close(wider.decode(wider.encode(x)[:, :12]), sae.decode(sae.encode(x)))
    assert wider.W_dec[12:].norm(dim=1).tolist() == pytest.approx([1.0] * 5, abs=1e-6)
    assert all(torch.equal(tensor, widen(sae, 0).state_dict()[name]) for name, tensor in sae.state_dict().items())


def family(correlated: bool) -> torch.Tensor:
    """Four pairs of orthogonal features; the second of a pair comes only with the first, or on its own."""
    generator = torch.Generator().manual_seed(0)
    parent = torch.rand(12_000, 4, generator=generator) < 0.25
    child = torch.rand(12_000, 4, generator=generator) < (0.5 if correlated else 0.125)
    child &= parent | (not correlated)
    x = torch.zeros(12_000, 24)
    x[:, :4] = parent * (1 + 0.2 * torch.randn(12_000, 4, generator=generator))
    x[:, 4:8] = child * (1 + 0.2 * torch.randn(12_000, 4, generator=generator))
    return x


def narrow_sae() -> MatryoshkaSAE:
    """A latent for each parent, and none for the children."""
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=24, num_latents=4, prefix_sizes=[4], k=2))
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(24)[:4])
        sae.W_enc.copy_(torch.eye(24)[:4])
    return sae


def test_a_narrow_sae_hedges_where_features_come_together_and_not_where_they_do_not():
    options = {"num_new": 4, "max_steps": 200, "batch_size": 512, "learning_rate": 5e-3, "use_cpu": True}
    (together,) = measure_hedging(made(family(correlated=True)), narrow_sae(), **options)
    (apart,) = measure_hedging(made(family(correlated=False)), narrow_sae(), **options)
    # Almost all that the parents' latents let go of is what the new latents take.
    assert together.projection > 0.9 * together.drift
    assert together.degree > 0.2
    assert together.degree > 4 * apart.degree


def test_every_prefix_gets_its_degree():
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=24, num_latents=6, prefix_sizes=[2, 6], k=1))
    found = measure_hedging(made(family(True)), sae, num_new=2, max_steps=5, batch_size=64, use_cpu=True)
    assert [(item.prefix, item.num_new) for item in found] == [(2, 2), (6, 2)]


def test_what_cannot_be_trained_is_refused_before_it_is():
    with pytest.raises(ValueError, match="30 activations, fewer than one batch of 2,048"):
        measure_hedging(made(family(True)[:30]), narrow_sae())
    with pytest.raises(ValueError, match="num_new must be from 1 to 23"):
        measure_hedging(made(family(True)), narrow_sae(), num_new=24)
    with pytest.raises(ValueError, match="reads activations of 24 dimensions, but these have 8"):
        measure_hedging(made(family(True)[:, :8]), narrow_sae())
