"""Progressive coding on dictionaries whose importance is known, and on a tiny language model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cross_entropy import measure_cross_entropy
from hf_msae.evaluation.activations import TextActivations, collect
from hf_msae.metrics import ReconstructionMeter
from hf_msae.research.progressive import (
    draw_progressive,
    fit_power_law,
    measure_importance,
    measure_progressive,
    reorder,
)
from hf_msae.sites import Site, resolve_site

WIDTH = 8
SITE = Site("made")


def identity_sae(decoder_norms=None) -> MatryoshkaSAE:
    """Latent j reads coordinate j and writes it back, times its norm; all of them fire where it is positive."""
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=WIDTH, num_latents=WIDTH, prefix_sizes=[3, WIDTH], k=2))
    norms = torch.ones(WIDTH) if decoder_norms is None else decoder_norms
    with torch.no_grad():
        sae.W_dec.copy_(torch.diag(norms))
        sae.W_enc.copy_(torch.diag(1 / norms))
    return sae.eval()


def random_sae(width=WIDTH, num_latents=24, seed=0, **changes) -> MatryoshkaSAE:
    torch.manual_seed(seed)
    config = {"hidden_size": width, "num_latents": num_latents, "prefix_sizes": [6, num_latents], "k": 4, **changes}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**config))
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_(std=0.1)
        sae.threshold.uniform_(0.1, 0.6)
    return sae.eval()


def made(x: torch.Tensor, model=None) -> TextActivations:
    return TextActivations(model, SITE, [], 0, 1, x, "made")


@pytest.fixture
def sparse() -> torch.Tensor:
    """Coordinate j is on for a share (j + 1)/10 of tokens, with the value 2^(−j): rare ones are strong."""
    generator = torch.Generator().manual_seed(0)
    on = torch.rand(4000, WIDTH, generator=generator) < (torch.arange(WIDTH) + 1) / 10
    return on * 2.0 ** -torch.arange(WIDTH)


def test_importance_is_what_was_planted(sparse):
    norms = torch.linspace(1, 3, WIDTH)
    importance = measure_importance(identity_sae(norms), sparse.split(999))
    share = (sparse > 0).double().mean(0)
    values = 2.0 ** -torch.arange(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(importance.frequency, share)
    torch.testing.assert_close(importance.contribution, share * values**2, rtol=1e-5, atol=0)
    torch.testing.assert_close(importance.energy, share * (values / norms) ** 2, rtol=1e-5, atol=0)
    assert importance.by("frequency").argmax() == WIDTH - 1
    assert importance.by("contribution").argmax() < 2


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(24)))
def test_another_order_is_the_same_dictionary(order):
    sae, order = random_sae(), torch.tensor(order)
    x = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(1))
    other = reorder(sae, order, [5, 24])
    torch.testing.assert_close(other.encode(x), sae.encode(x)[:, order])
    torch.testing.assert_close(other.decode(other.encode(x)), sae.decode(sae.encode(x)))
    kept = torch.zeros(24).index_fill(0, order[:5], 1.0)
    torch.testing.assert_close(other.decode(other.encode(x), prefix=5), sae.decode(sae.encode(x) * kept))
    back = reorder(other, order.argsort(), [6, 24])
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in sae.state_dict().items())


@pytest.mark.parametrize("activation", ["batch_topk", "topk", "jumprelu", "relu"])
def test_every_kind_of_sae_can_be_reordered(activation):
    sae = random_sae(activation=activation, level_weights=[1, 2])
    x = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(1))
    order = torch.arange(24).flip(0)
    assert torch.equal(reorder(sae, order).encode(x) > 0, sae.encode(x)[:, order] > 0)
    assert reorder(sae, order).config.prefix_sizes == [24]


def test_what_is_no_permutation_is_refused():
    with pytest.raises(ValueError, match="each of the 24 latents once, got \\(24,\\) with 23"):
        reorder(random_sae(), torch.tensor([0, *range(23)]))


def test_the_best_latents_by_energy_explain_what_they_should(sparse):
    """Coordinates are orthogonal, so what is lost is the mean square of those left out."""
    sae = reorder(identity_sae(), torch.randperm(WIDTH, generator=torch.Generator().manual_seed(3)))
    result = measure_progressive(made(sparse), {"one": sae}, [2, 5], ce_tokens=0, rsa_tokens=50)
    squares = sparse.double().pow(2).mean(0).sort(descending=True).values
    variance = (sparse.double() - sparse.double().mean(0)).pow(2).sum(1).mean()
    found = {(point.order, point.prefix): point for point in result.points}
    assert len(found) == 4 * 3
    for size in (2, 5, WIDTH):
        expected = 1 - squares[size:].sum() / variance
        assert found["energy", size].fve == pytest.approx(expected.item(), abs=1e-6)
        assert found["contribution", size].fve == pytest.approx(expected.item(), abs=1e-6)
    assert found["energy", 2].fve > found["frequency", 2].fve + 0.2
    assert found["frequency", 2].l0 > found["energy", 2].l0
    assert found["own", WIDTH].rsa == pytest.approx(1, abs=1e-5)
    assert found["energy", 2].rsa < found["energy", 5].rsa < 1
    assert found["own", WIDTH].cka == pytest.approx(1, abs=1e-6)
    assert found["own", 5].ce_recovered is None


def test_the_order_in_the_file_only_matters_to_itself(sparse):
    one, two = identity_sae(), reorder(identity_sae(), torch.arange(WIDTH).flip(0))
    result = measure_progressive(made(sparse), {"one": one, "two": two}, [3], ce_tokens=0, rsa_tokens=50)
    fve = {(point.sae, point.order, point.prefix): point.fve for point in result.points}
    assert fve["one", "energy", 3] == pytest.approx(fve["two", "energy", 3], abs=1e-9)
    assert fve["one", "own", 3] > fve["two", "own", 3] + 0.5
    assert result.laws["one"] == result.laws["two"]


def test_nesting_is_measured_as_everywhere_else(lm, tokenizer, texts):
    site = resolve_site(lm, "layers.0")
    text = collect(lm, tokenizer, site, texts[:100], num_tokens=300, context_length=32)
    sae = random_sae(width=16)
    result = measure_progressive(text, {"sae": sae}, [6], orders=["own", "energy"], ce_tokens=200, rsa_tokens=100)
    meter = ReconstructionMeter(sae)
    for x in text.batches(sae):
        meter.update(x)
    spliced = measure_cross_entropy(lm, site, sae, meter.mean, text.token_batches(200))
    own = [point for point in result.points if point.order == "own"]
    assert [point.prefix for point in own] == [6, 24]
    assert [point.fve for point in own] == pytest.approx([level.fve for level in meter.levels()], abs=1e-9)
    assert [point.ce_recovered for point in own] == pytest.approx(
        [level.ce_recovered for level in spliced.levels], abs=1e-6
    )
    assert own[1].ce_recovered == pytest.approx(result.points[3].ce_recovered, abs=1e-4)


def test_what_cannot_be_measured_is_refused_in_words(sparse):
    sae = identity_sae()
    with pytest.raises(ValueError, match="ordered by own, energy, contribution, frequency; got size"):
        measure_progressive(made(sparse), {"one": sae}, [2], orders=["size"])
    with pytest.raises(ValueError, match=r"increase, got \[4, 2\]"):
        measure_progressive(made(sparse), {"one": sae}, [4, 2])
    with pytest.raises(ValueError, match="The SAE one reads activations of 8 dimensions, but these have 5"):
        measure_progressive(made(sparse[:, :5]), {"one": sae}, [2])
    with pytest.raises(ValueError, match="got none"):
        measure_importance(sae, [])


@pytest.mark.parametrize("exponent", [0.5, 1.3])
def test_a_power_law_is_found_again(exponent):
    ranks = torch.arange(1, 501, dtype=torch.float64)
    values = 5 * ranks**-exponent
    shuffled = torch.cat([values, torch.zeros(40)])[torch.randperm(540, generator=torch.Generator().manual_seed(0))]
    law = fit_power_law(shuffled)
    assert (law.exponent, law.scale) == pytest.approx((exponent, 5), rel=1e-9)
    assert (law.first, law.last) == (1, 500)
    assert law.r2 == pytest.approx(1, abs=1e-12)
    assert law.r2_exponential < 0.9
    assert fit_power_law(shuffled, 10, 100).exponent == pytest.approx(exponent, rel=1e-9)


def test_an_exponential_is_no_power_law():
    law = fit_power_law(torch.exp(-0.02 * torch.arange(500, dtype=torch.float64)))
    assert law.r2_exponential == pytest.approx(1, abs=1e-12)
    assert law.r2 < 0.75


def test_a_break_in_the_law_shows_in_the_range():
    ranks = torch.arange(1, 1001, dtype=torch.float64)
    values = torch.where(ranks <= 100, ranks**-0.5, 100.0**1.5 * ranks**-2)
    assert fit_power_law(values, 1, 100).exponent == pytest.approx(0.5)
    assert fit_power_law(values, 100, 1000).exponent == pytest.approx(2)
    assert fit_power_law(values).r2 < 0.95


def test_a_range_that_reaches_zeros_is_refused():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0])
    with pytest.raises(ValueError, match=r"from 1 to 3, .* got 1 to 4"):
        fit_power_law(values, 1, 4)
    with pytest.raises(ValueError, match="at least three ranks"):
        fit_power_law(values, 2)


def test_the_plot_shows_what_was_measured(sparse):
    from matplotlib.figure import Figure

    result = measure_progressive(made(sparse), {"one": identity_sae()}, [2, 5], ce_tokens=0, rsa_tokens=50)
    figure = Figure()
    draw_progressive(result, figure)
    left, middle, right = figure.axes
    drawn = {line.get_label(): line.get_ydata() for line in left.lines}
    for order in ("own", "energy", "frequency"):
        of = [point.fve for point in result.points if point.order == order]
        assert drawn[f"one, {order}"] == pytest.approx(of)
    assert [label.get_text() for label in middle.get_xticklabels()] == ["2", "5", "8"]
    law = result.laws["one"]
    values, fitted = (line.get_ydata() for line in right.lines)
    assert len(values) == WIDTH
    assert fitted[0] == pytest.approx(law.scale)
    assert fitted[-1] == pytest.approx(law.scale * WIDTH**-law.exponent)
