"""Sparse equals dense, and statistics equal those of all activations at once."""

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.interpret.activity import NUM_BINS, LatentStatistics, active_latents, gains, reconstruct


def make_sae(**changes) -> MatryoshkaSAE:
    torch.manual_seed(1)
    config = {"hidden_size": 12, "num_latents": 96, "prefix_sizes": [16, 96], "k": 4}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**config | changes)).eval()
    for name in ("b_enc", "b_dec"):
        torch.nn.init.normal_(getattr(sae, name), std=0.1)
    sae.threshold.data.copy_(torch.rand(96) + 0.5)
    return sae


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"apply_b_dec_to_input": False},
        {"activation": "topk"},
        {"activation": "topk", "inference": "topk"},
        {"activation": "jumprelu"},
        {"activation": "relu"},  # half of all latents are active: too dense for the sparse path
    ],
)
def test_active_latents_are_what_encode_has_above_zero(changes):
    sae, x = make_sae(**changes), torch.randn(200, 12)
    if changes.get("activation") == "relu":
        sae.threshold.zero_()
    active, dense = active_latents(sae, x), sae.encode(x)
    tokens, latents = dense.nonzero(as_tuple=True)
    assert len(tokens) > 100
    assert torch.equal(active.tokens, tokens)
    assert torch.equal(active.latents, latents)
    torch.testing.assert_close(active.values, dense[tokens, latents])
    torch.testing.assert_close(reconstruct(sae, active, 200), sae.decode(dense))


def test_tokens_without_any_active_latent_are_the_decoder_bias():
    sae = make_sae()
    sae.threshold.fill_(1e6)
    sae.threshold[3] = 0.01
    x = torch.randn(50, 12)
    active = active_latents(sae, x)
    silent = sorted({*range(50)} - {*active.tokens.tolist()})
    assert 5 < len(silent) < 45
    torch.testing.assert_close(reconstruct(sae, active, 50)[silent], sae.b_dec.detach().expand(len(silent), -1))


def test_a_gain_is_the_error_that_comes_without_the_latent():
    sae, x = make_sae(), torch.randn(40, 12)
    active, dense = active_latents(sae, x), sae.encode(x)
    errors = (x - sae.decode(dense)).detach()
    found = gains(sae, active, errors)
    for place in range(0, len(found), 7):
        token, latent = active.tokens[place], active.latents[place]
        without = dense[token].clone()
        without[latent] = 0
        worse = (x[token] - sae.decode(without)).square().sum() - errors[token].square().sum()
        assert found[place].item() == pytest.approx(worse.item(), rel=1e-4, abs=1e-5)


def test_an_sae_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call sae\.eval\(\)"):
        active_latents(make_sae().train(), torch.randn(4, 12))


def statistics_of(latents: torch.Tensor, values: torch.Tensor, order: torch.Tensor, batch: int) -> LatentStatistics:
    statistics = LatentStatistics(6)
    for rows in order.split(batch):
        statistics.update(latents[rows], values[rows], num_tokens=2 * len(rows))
    return statistics


@pytest.mark.parametrize("batch", [1, 17, 500])
def test_statistics_and_histograms_do_not_depend_on_order_or_batches(batch):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randint(5, (500,), generator=generator)  # the sixth never fires
    # Over nine orders of magnitude, so that ranges double many times.
    values = torch.exp(torch.randn(500, generator=generator) * 5)
    found = statistics_of(latents, values, torch.randperm(500, generator=generator), batch)
    assert found.num_tokens == 1000
    for latent in range(5):
        own = values[latents == latent].double()
        top = 2.0 ** int(found.exponent[latent])
        assert top / 2 <= own.max() < top
        expected = torch.bincount((own / top * NUM_BINS).long(), minlength=NUM_BINS)
        assert torch.equal(found.histogram[latent], expected)
        assert found.count[latent] == len(own)
        assert found.firing_rate[latent].item() == len(own) / 1000
        assert found.mean[latent].item() == pytest.approx(own.mean().item())
        assert found.maximum[latent].item() == own.max().item()
    assert found.count[5] == found.histogram[5].sum() == found.mean[5] == 0
