"""Interpreting transcoders: latents are read at the input, and what they write and explain is of the output."""

import pytest
import torch
from small_saes import mlp_transcoder

from hf_msae.interpret import interpret, scan
from hf_msae.sites import capture, resolve_site

MAX_TOKENS = 400


@pytest.mark.parametrize("tokenized", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_what_is_scanned_is_read_at_the_input_and_explains_the_output(lm, tokenizer, texts, skip, tokenized):
    """By hand, document by document; they are scanned in another order. Nor is a token's own vector a latent's."""
    sae, texts = mlp_transcoder(lm, skip), texts[:60]
    vectors = torch.randn(lm.config.vocab_size, sae.config.output_size, generator=torch.Generator().manual_seed(1))
    vectors = 0.05 * vectors if tokenized else torch.zeros_like(vectors)
    if tokenized:
        sae.config.lookup_size, sae.W_token = len(vectors), torch.nn.Parameter(vectors)
    found = scan(
        lm, tokenizer, sae, texts, max_tokens=10**6, context_length=64, packing=False, norm_outlier_multiple=None
    ).firings
    site, site_out = (resolve_site(lm, name) for name in (sae.config.site, sae.config.site_out))
    fired, energies = torch.zeros(32, dtype=torch.long), []
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            x, y = (hidden[0, 1:] for hidden in capture(lm, [site, site_out], input_ids=ids).values())
            fired += (sae.encode(x) > 0).sum(0)
            base = sae.b_dec + (x @ sae.W_skip.T if skip else 0) + vectors[ids[0, 1:]]
            energies.append((y - base).pow(2).sum(-1))
    energy = torch.cat(energies)
    assert found.num_tokens == len(energy)
    torch.testing.assert_close(found.energies.sort().values, energy.sort().values, rtol=1e-3, atol=1e-6)
    assert fired.max() > 0
    assert torch.equal(torch.bincount(found.active.latents.long(), minlength=32), fired)
    # A latent's error is of the output, whatever it reads.
    assert found.error_sums.shape == (32, sae.config.output_size)


@pytest.mark.slow
def test_pages_and_a_hierarchy(lm, tokenizer, texts, tmp_path):
    sae = mlp_transcoder(lm)
    pages = interpret(lm, tokenizer, sae, texts, tmp_path / "i", max_tokens=MAX_TOKENS, context_length=24)
    latent = max(range(32), key=lambda index: pages.page(index).firing_rate)
    page = pages.page(latent)
    assert page.top
    assert page.promoted


@pytest.mark.slow
def test_of_another_width_pages_have_no_effects(lm, tokenizer, texts, tmp_path):
    """What it writes is not in the residual stream."""
    places = {"site_out": "model.layers.0.mlp.down_proj:input", "hidden_size_out": 24}
    sae = mlp_transcoder(lm)
    wide = type(sae)(type(sae.config)(**{**sae.config.to_dict(), **places})).eval()
    wide.threshold.fill_(0.5)
    pages = interpret(lm, tokenizer, wide, texts, tmp_path / "i", max_tokens=MAX_TOKENS, context_length=24)
    assert all(not page.promoted for page in pages)
