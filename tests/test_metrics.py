"""The numbers against closed forms and sums written out by hand."""

import numpy as np
import pytest
import torch
from small_saes import copying_sae
from torch import nn

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cross_entropy import measure_cross_entropy
from hf_msae.data import TokenWindows, collate
from hf_msae.metrics import ReconstructionMeter, merge, table_rows
from hf_msae.sites import resolve_site


@pytest.fixture
def sae():
    torch.manual_seed(1)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=16, num_latents=32, prefix_sizes=[4, 16, 32], k=3)).eval()
    sae.threshold.fill_(1.0)
    return sae


@pytest.mark.parametrize(("mean", "scale"), [(0, 1), (1000, 1), (0, 1e4), (-30, 1)])
def test_fve_is_the_coefficient_of_determination(sae, mean, scale):
    """Where a large mean or scale would break a careless formula, against numpy in float64."""
    x = torch.randn(500, 16) * scale + mean
    with torch.no_grad():
        sae.b_dec.fill_(mean)
        sae.threshold.fill_(scale)
    meter = ReconstructionMeter(sae)
    for part in x.split(77):
        meter.update(part)
    data = x.double().numpy()
    with torch.no_grad():
        latents = sae.encode(x)
        for level, prefix in zip(meter.levels(), (4, 16, 32), strict=True):
            error = data - sae.decode(latents, prefix=prefix).double().numpy()
            expected = 1 - (error**2).sum() / ((data - data.mean(0)) ** 2).sum()
            assert level.fve == pytest.approx(expected, abs=1e-5)
            assert level.l0 == pytest.approx((latents[:, :prefix] > 0).sum().item() / 500)
            silent = (latents[:, :prefix] == 0).all(0).double().mean().item()
            assert level.dead == pytest.approx(silent)
    assert np.allclose(meter.mean.numpy(), data.mean(0))
    assert torch.equal(meter.max_activation, latents.max(0).values)


def test_exact_reconstruction_explains_everything():
    meter = ReconstructionMeter(copying_sae())
    meter.update(torch.randn(100, 16))
    assert meter.levels()[-1].fve == pytest.approx(1, abs=1e-12)
    assert meter.levels()[0].fve < 1


@pytest.fixture
def batches(lm, tokenizer, texts):
    windows = list(TokenWindows(texts[:40], tokenizer, context_length=24))
    return [collate(windows[start : start + 4], 0) for start in range(0, len(windows), 4)]


def test_ce_recovered_is_one_for_a_copy_and_zero_for_zero(lm, batches):
    site, mean = resolve_site(lm, "layers.0"), torch.zeros(16)
    exact = measure_cross_entropy(lm, site, copying_sae(), mean, batches).levels[-1]
    assert exact.ce_recovered == pytest.approx(1, abs=1e-6)
    assert exact.ce_increase == pytest.approx(0, abs=1e-7)
    nothing = measure_cross_entropy(lm, site, copying_sae(0.0), mean, batches).levels[-1]
    assert nothing.ce_recovered == pytest.approx(0, abs=1e-9)


def test_cross_entropy_leaves_special_positions_alone(lm, tokenizer, batches):
    """Against a forward written out by hand: embeddings, first layer, replacement where `keep`, second layer, head."""
    site, mean = resolve_site(lm, "layers.0"), torch.randn(16)
    measured = measure_cross_entropy(lm, site, copying_sae(), mean, batches)
    total = {"clean": 0.0, "zero": 0.0, "mean": 0.0}
    count = 0
    for batch in batches:
        ids, keep = batch["input_ids"], batch["keep"]
        for row in range(len(ids)):
            length = int((ids[row] != 0).sum())
            tokens, kept = ids[row : row + 1, :length], keep[row, :length]
            assert not kept[0]
            scored = [t for t in range(length - 1) if kept[t] and kept[t + 1]]
            count += len(scored)
            for name, value in (("clean", None), ("zero", torch.zeros(16)), ("mean", mean)):
                losses = by_hand(lm, tokens, kept, value)
                total[name] += losses[scored].sum().item()
    assert measured.ce_tokens == count
    for name, expected in total.items():
        assert vars(measured)[f"ce_{name}"] == pytest.approx(expected / count, rel=1e-5)


@torch.no_grad()
def by_hand(lm, tokens, kept, value):
    body = lm.model
    hidden = body.embed_tokens(tokens)
    rope = body.rotary_emb(hidden, torch.arange(tokens.shape[1])[None])
    mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    for number, layer in enumerate(body.layers):
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rope)
        if number == 0 and value is not None:
            hidden = torch.where(kept[None, :, None], value, hidden)
    logits = lm.lm_head(body.norm(hidden))[0]
    return nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")


def test_the_table_shows_a_missing_cross_entropy_as_a_dash(sae):
    meter = ReconstructionMeter(sae)
    meter.update(torch.randn(10, 16))
    header, rows = table_rows(merge(meter, None))
    assert header == ("prefix", "L0", "FVE", "CE recovered", "dead %")
    assert [row[0] for row in rows] == ["4", "16", "32"]
    assert rows[0][3] == "–"
