"""One pass over text: what it collects equals what all activations at once would give."""

import copy

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.data import ActivationError, TokenWindows
from hf_msae.interpret.contexts import NO_TOKEN
from hf_msae.interpret.scan import scan
from hf_msae.sites import capture, resolve_site


@pytest.fixture(scope="module")
def sae() -> MatryoshkaSAE:
    """Random, at the first layer of the tests' LM."""
    torch.manual_seed(5)
    config = MatryoshkaSAEConfig(hidden_size=16, num_latents=32, prefix_sizes=[8, 32], k=3, site="layers.0")
    sae = MatryoshkaSAE(config).eval()
    sae.threshold.fill_(0.02)
    return sae


def dense(lm, tokenizer, sae, texts, length):
    """For every window: its ids, which count, and all latent activations, zero where a token does not count."""
    site = resolve_site(lm, "layers.0")
    for window in TokenWindows(texts, tokenizer, context_length=length, pack=False):
        x = capture(lm, [site], input_ids=window.input_ids[None])[site][0]
        yield window, torch.where(window.keep[:, None], sae.encode(x), 0).detach()


def test_contexts_and_statistics_equal_brute_force(lm, tokenizer, sae, texts):
    found = scan(
        lm,
        tokenizer,
        sae,
        texts[:80],
        max_tokens=10**6,
        context_length=24,
        packing=False,
        top_contexts=3,
        sampled_contexts=200,
        context_tokens=8,
    )
    windows = list(dense(lm, tokenizer, sae, texts[:80], 24))
    everything = torch.cat([latents[window.keep] for window, latents in windows])
    torch.testing.assert_close(found.statistics.count, (everything > 0).sum(0))
    torch.testing.assert_close(found.statistics.maximum, everything.max(0).values)
    assert found.num_tokens == len(everything)
    for latent in range(32):
        peaks = sorted((latents[:, latent].max().item() for _, latents in windows), reverse=True)
        expected = [peak for peak in peaks if peak > 0][:3]
        top = found.top.of(latent)
        own = top.activations.gather(1, top.position[:, None])[:, 0]
        assert own.tolist() == pytest.approx(expected, rel=1e-5)
        # Every firing is in the sample where it has room for all: so its quantiles are exact.
        sample = found.sampled.of(latent)
        values = sample.activations.gather(1, sample.position[:, None])[:, 0].sort().values
        fired = everything[:, latent][everything[:, latent] > 0].sort().values
        torch.testing.assert_close(values, fired[-200:] if len(fired) <= 200 else values)
        if len(fired) > 200:
            assert len(values) == 200
            # A quantile of 200 draws: within 4 standard deviations of the rank.
            rank = (fired < values[100]).double().mean().item()
            assert abs(rank - 0.5) < 4 * (0.25 / 200) ** 0.5


def test_a_context_shows_the_text_around_a_token_and_the_latent_on_each_of_its_tokens(lm, tokenizer, sae, texts):
    found = scan(
        lm,
        tokenizer,
        sae,
        texts[:40],
        max_tokens=10**6,
        context_length=24,
        packing=False,
        top_contexts=4,
        sampled_contexts=5,
        context_tokens=8,
    )
    windows = [(window.input_ids.tolist(), latents) for window, latents in dense(lm, tokenizer, sae, texts[:40], 24)]
    seen = 0
    for store in (found.top, found.sampled):
        for latent in range(32):
            for ids, activations, position in zip(*store.of(latent), strict=True):
                shown = [token for token in ids.tolist() if token != NO_TOKEN]
                places = [
                    (latents, start)
                    for text, latents in windows
                    for start in range(len(text) - len(shown) + 1)
                    if text[start : start + len(shown)] == shown
                ]
                values = [latents[start : start + len(shown), latent] for latents, start in places]
                assert any(torch.allclose(v, activations[: len(shown)], atol=1e-6) for v in values)
                assert activations[position] > 0
                assert len(shown) == 8 or any(len(text) == len(shown) for text, _ in windows)
                seen += 1
    assert seen > 100


def test_the_order_of_documents_changes_nothing(lm, tokenizer, sae, texts):
    options = {"max_tokens": 10**6, "packing": False, "context_length": 24, "top_contexts": 4, "sampled_contexts": 6}
    first = scan(lm, tokenizer, sae, texts[:60], **options)
    second = scan(lm, tokenizer, sae, texts[:60][::-1], lm_batch_size=5, **options)
    assert torch.equal(first.statistics.count, second.statistics.count)
    assert torch.equal(first.statistics.exponent, second.statistics.exponent)
    torch.testing.assert_close(first.statistics.total, second.statistics.total)
    torch.testing.assert_close(first.firings.error_sums, second.firings.error_sums, rtol=1e-4, atol=1e-4)
    for ours, theirs in ((first.top, second.top), (first.sampled, second.sampled)):
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-5, atol=1e-6)
        assert (ours.contexts.token_ids == theirs.contexts.token_ids).all(-1).double().mean() > 0.999


def test_special_tokens_are_never_counted(known):
    found = scan(known.model, known.tokenizer, known.sae, known.texts, max_tokens=10**6, packing=False)
    assert found.num_tokens == 150 * 12
    assert found.statistics.firing_rate[1] == 1.0  # the latent of every word, which BOS is not
    assert found.firings.num_tokens == 150 * 12
    torch.testing.assert_close(found.firings.error_sums, torch.zeros_like(found.firings.error_sums))


def test_reading_stops_at_max_tokens_and_recording_before(known):
    found = scan(
        known.model, known.tokenizer, known.sae, known.texts, max_tokens=300, record_tokens=100, lm_batch_size=4
    )
    assert 300 <= found.num_tokens < 300 + 4 * 16
    assert 100 <= found.firings.num_tokens < 100 + 4 * 16


def test_mistakes_are_told_before_anything_is_read(known, lm, tokenizer):
    model, texts = known.model, known.texts
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        scan(model, tokenizer, known.sae, texts, max_tokens=0)
    with pytest.raises(ValueError, match=r"24 dimensions, but those at .* have 16"):
        scan(lm, tokenizer, known.sae, texts, max_tokens=10)
    nameless = copy.deepcopy(known.sae)
    nameless.config.site = None
    with pytest.raises(ValueError, match="records no site"):
        scan(model, tokenizer, nameless, texts, max_tokens=10)
    broken = copy.deepcopy(model)
    broken.model.embed_tokens.weight.data[4:] = torch.nan
    with pytest.raises(ActivationError, match="NaN or infinite"):
        scan(broken, tokenizer, known.sae, texts, max_tokens=10)
