"""Core numbers against scikit-learn, closed forms, and codes whose length is known."""

import math

import pytest
import torch
from small_saes import copying_sae

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cross_entropy import measure_cross_entropy
from hf_msae.data import hold_out
from hf_msae.evaluation.activations import collect
from hf_msae.evaluation.baselines import build_pca
from hf_msae.evaluation.core import DENSITY_EDGES, density, description_bits, measure_core, rate_distortion
from hf_msae.metrics import ReconstructionMeter
from hf_msae.sites import resolve_site


@pytest.fixture
def sae():
    torch.manual_seed(1)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=16, num_latents=32, prefix_sizes=[4, 16, 32], k=3)).eval()
    sae.threshold.fill_(1.0)
    return sae


@pytest.mark.parametrize(("mean", "scale"), [(0, 1), (1000, 1), (0, 1e4), (-30, 1)])
def test_fve_is_scikit_learns_r2(sae, mean, scale):
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn (extra: test)")
    x = torch.randn(500, 16) * scale * torch.linspace(0.1, 3, 16) + mean
    with torch.no_grad():
        sae.b_dec.fill_(mean)
        sae.threshold.fill_(scale)
    meter = ReconstructionMeter(sae)
    for part in x.split(123):
        meter.update(part)
    for level in meter.levels():
        reconstruction = sae.decode(sae.encode(x), prefix=level.prefix).detach()
        expected = metrics.r2_score(x.double(), reconstruction.double(), multioutput="variance_weighted")
        assert level.fve == pytest.approx(expected, abs=1e-5)


def test_scale_and_shift_do_not_move_fve_but_a_shift_flatters_nmse(sae):
    x = torch.randn(800, 16)
    plain, shifted = ReconstructionMeter(sae), None
    plain.update(x)
    with torch.no_grad():
        sae.b_dec.fill_(50.0)
    shifted = ReconstructionMeter(sae)
    shifted.update(x + 50)
    for before, after in zip(plain.levels(), shifted.levels(), strict=True):
        assert after.fve == pytest.approx(before.fve, abs=1e-3)
        assert after.nmse < 0.01 * before.nmse
        assert before.nmse == pytest.approx(1 - before.fve, abs=0.01)  # the mean is near zero


def test_a_shrunken_copy_keeps_direction_and_loses_length():
    meter = ReconstructionMeter(copying_sae(0.5))
    meter.update(torch.randn(100, 16))
    level = meter.levels()[-1]
    assert level.cosine == pytest.approx(1, abs=1e-6)
    assert level.norm_ratio == pytest.approx(0.5, abs=1e-6)
    assert level.nmse == pytest.approx(0.25, abs=1e-6)


def test_kl_is_zero_for_a_copy_and_that_of_torch_otherwise(lm, tokenizer, texts):
    site = resolve_site(lm, "layers.0")
    text = collect(lm, tokenizer, site, texts, num_tokens=150, context_length=24)
    batches = list(text.token_batches(150))
    exact = measure_cross_entropy(lm, site, copying_sae(), torch.zeros(16), batches)
    assert exact.levels[-1].kl == pytest.approx(0, abs=1e-7)
    nothing = measure_cross_entropy(lm, site, copying_sae(0.0), torch.zeros(16), batches)
    # All levels of a decoder of zeros are the zero ablation.
    assert nothing.levels[-1].kl == pytest.approx(nothing.kl_zero, rel=1e-6)
    total, count = 0.0, 0
    for batch in batches:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        counted = batch["keep"][:, :-1] & batch["keep"][:, 1:]
        with torch.no_grad():
            clean = lm(**inputs).logits[:, :-1][counted].log_softmax(-1)
            handle = lm.model.layers[0].register_forward_hook(
                lambda module, args, out, keep=batch["keep"]: torch.where(keep[..., None], 0.0, out)
            )
            zeroed = lm(**inputs).logits[:, :-1][counted].log_softmax(-1)
            handle.remove()
        total += torch.nn.functional.kl_div(zeroed, clean, log_target=True, reduction="sum").item()
        count += int(counted.sum())
    assert nothing.kl_zero == pytest.approx(total / count, rel=1e-4)


def test_ce_recovered_is_nothing_for_an_sae_that_does_what_an_ablation_does(lm, tokenizer, texts):
    site = resolve_site(lm, "layers.0")
    text = collect(lm, tokenizer, site, texts, num_tokens=150, context_length=24)
    zero, constant = copying_sae(0.0), copying_sae(0.0)
    with torch.no_grad():
        constant.b_dec.copy_(text.x.mean(0))
    saes = {"zero": zero, "mean": constant, "copy": copying_sae()}
    found = {
        name: core.measurement.levels[-1]
        for name, core in measure_core(text, saes, ce_tokens=150, rate_tokens=50).items()
    }
    assert found["zero"].ce_recovered == pytest.approx(0, abs=1e-4)
    assert found["mean"].ce_recovered_mean == pytest.approx(0, abs=1e-4)
    assert found["mean"].fve == pytest.approx(0, abs=1e-6)
    assert found["copy"].ce_recovered == pytest.approx(1, abs=1e-4)
    assert found["copy"].ce_recovered_mean == pytest.approx(1, abs=1e-4)
    assert found["copy"].ce_increase == pytest.approx(0, abs=1e-6)


def test_saes_are_measured_on_the_same_tokens(lm, tokenizer, texts, sae):
    site = resolve_site(lm, "layers.0")
    text = collect(lm, tokenizer, site, texts, num_tokens=300, context_length=24, lm_batch_size=3)
    windows = hold_out(texts, tokenizer, 24, 300).windows
    assert text.num_tokens >= 300
    assert torch.equal(text.windows[0].input_ids, windows[0].input_ids)
    found = measure_core(text, {"sae": sae, "copy": copying_sae()}, ce_tokens=100, rate_tokens=200)
    assert found["sae"].measurement.tokens == found["copy"].measurement.tokens == text.num_tokens
    assert found["copy"].measurement.levels[-1].fve == pytest.approx(1, abs=1e-9)
    assert found["copy"].measurement.levels[-1].ce_recovered == pytest.approx(1, abs=1e-5)
    assert found["sae"].measurement.ce_clean == found["copy"].measurement.ce_clean
    assert found["sae"].rate_tokens == 200
    without = measure_core(text, {"sae": sae}, ce_tokens=0, rate_tokens=200)["sae"].measurement
    assert without.ce_clean is None
    assert without.levels[0].fve == found["sae"].measurement.levels[0].fve


def test_densities_are_counted_by_the_level_that_adds_the_latents():
    rate = torch.tensor([0.5, 0.02, 0.0, 1e-7, 0.011, 0.0], dtype=torch.float64)
    found = density(rate, [2, 6])
    assert found.dead == [0, 2]
    assert [sum(counts) for counts in found.counts] == [2, 2]
    assert found.counts[0][-1] == 1  # 0.5 is above 10^-0.5
    assert found.counts[1][0] == 1  # 1e-7 lies below the first edge
    assert found.counts[1][DENSITY_EDGES.index(-2.0)] == 1
    assert found.above_1_percent == pytest.approx(3 / 6)
    assert found.above_10_percent == pytest.approx(1 / 6)


def test_a_latent_that_fires_half_the_time_with_four_equal_values_takes_two_bits():
    bits = description_bits(torch.tensor([[25.0, 25, 25, 25], [100, 0, 0, 0], [0, 0, 0, 0], [200, 0, 0, 0]]), 200)
    assert bits.tolist() == pytest.approx([1 + 0.5 * 2, 1.0, 0.0, 0.0])


def test_finer_values_cost_more_bits_and_explain_more():
    sae = copying_sae()
    points = rate_distortion(sae, torch.randn(2000, 16))
    widest = sorted((p for p in points if p.prefix == 32), key=lambda p: p.cells)
    assert [p.cells for p in widest] == [4, 16, 64]
    assert widest[0].bits < widest[1].bits < widest[2].bits
    assert widest[0].fve < widest[1].fve < widest[2].fve
    # Halving the cells four times over adds close to four bits for each of 16 values, or less where values are rare.
    assert 16 * 3.5 < widest[2].bits - widest[0].bits <= 16 * 4
    assert widest[2].fve == pytest.approx(1, abs=2e-3)
    for cells in (4, 16, 64):
        inner, outer = (next(p for p in points if (p.prefix, p.cells) == (m, cells)) for m in (16, 32))
        assert inner.bits < outer.bits


def test_principal_components_explain_their_eigenvalues():
    torch.manual_seed(0)
    x = torch.randn(400, 16) @ torch.randn(16, 16) + 5
    sae = build_pca(x, MatryoshkaSAEConfig(hidden_size=16, num_latents=32, k=4), [1.2, 3.4])
    assert sae.config.prefix_sizes == [2, 6, 32]
    meter = ReconstructionMeter(sae)
    meter.update(x)
    values = torch.linalg.eigvalsh(torch.cov(x.double().T)).flip(0)
    for level, components in zip(meter.levels(), (1, 3, 16), strict=True):
        assert level.fve == pytest.approx((values[:components].sum() / values.sum()).item(), abs=1e-5)
        assert level.l0 == pytest.approx(components, abs=0.02)


def test_an_ablation_that_changes_nothing_leaves_nothing_to_recover(lm, tokenizer, texts):
    """A site whose value does not matter: CE recovered is unknown, not infinite."""
    from hf_msae.cross_entropy import CLEAN, MEAN, ZERO, _functional_measurement

    sae = copying_sae()
    ce = {CLEAN: 2.0, ZERO: 2.0, MEAN: 3.0, ("", 16): 2.5, ("", 32): 2.0}
    levels = _functional_measurement("", sae, ce, dict.fromkeys(ce, 0.0), 10).levels
    assert [level.ce_recovered for level in levels] == [None, None]
    assert [level.ce_recovered_mean for level in levels] == [0.5, 1.0]
    assert not math.isnan(levels[0].ce_increase)
