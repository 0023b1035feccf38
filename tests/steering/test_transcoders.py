"""Steering with a transcoder: its latents are read at one site, and what they write is added at the other."""

import pytest
import torch
from steered_runs import IDS, logits
from torch import Tensor
from transformers import PreTrainedModel

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import Site, capture, resolve_site
from hf_msae.steering import Gate, LatentEdit, SteeringError, steer
from hf_msae.steering.exporting import constant_shifts
from hf_msae.steering.saved import Steering

READ, WRITTEN = "layers.1.mlp:input", "layers.1.mlp"


def build(model: PreTrainedModel, skip: bool = True, **changes) -> MatryoshkaSAE:
    """A transcoder of an MLP, 8 of whose 48 latents are active on a token."""
    torch.manual_seed(0)
    sites = [resolve_site(model, name) for name in (READ, WRITTEN)]
    ids = torch.randint(3, model.config.vocab_size, (16, 24))
    x, y = (hidden.flatten(0, 1) for hidden in capture(model, sites, input_ids=ids).values())
    places = {"site": str(sites[0]), "site_out": str(sites[1]), "hidden_size_out": y.shape[1]}
    shape = {"hidden_size": x.shape[1], "num_latents": 48, "prefix_sizes": [8, 24, 48], "k": 8, "skip": skip}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**(shape | places | changes))).eval()
    with torch.no_grad():
        sae.b_dec.copy_(y.mean(0))
        if skip:
            sae.W_skip.normal_(0, 0.05)
        sae.calibrate_threshold([x])
        sae.max_activation.copy_(sae.encode(x).amax(0).clamp_min(0.1))
    return sae


@pytest.fixture(scope="module")
def transcoder(llama) -> MatryoshkaSAE:
    return build(llama)


def seen(model: PreTrainedModel, sae: MatryoshkaSAE) -> tuple[Tensor, Tensor]:
    """What is read and what is written (batch, time, hidden), without the first token, which is special."""
    sites = [Site.parse(sae.config.site), Site.parse(sae.config.site_out)]
    return tuple(hidden[:, 1:] for hidden in capture(model, sites, input_ids=IDS).values())


def test_each_method_adds_its_change_of_latents_at_the_output(llama, transcoder):
    x, y = seen(llama, transcoder)
    f = transcoder.encode(x)
    latent = int(f.flatten(0, 1).sum(0).argmax())
    row, own = transcoder.W_dec[latent], f[..., latent, None]
    largest = transcoder.max_activation[latent]
    expected = {
        ("add", "max", 2.0): 2 * largest * row.expand_as(y),
        ("add", "norm", 0.5): 0.5 * y.norm(dim=-1, keepdim=True) * row / row.norm(),
        ("clamp", "absolute", 3.0): (3 - own) * row,
        ("scale", "max", 0.5): -0.5 * own * row,
        ("ablate", "max", 0.0): -own * row,
    }
    for (method, units, value), change in expected.items():
        with steer(llama, transcoder, {latent: value}, method=method, units=units):
            read, written = seen(llama, transcoder)
        assert torch.equal(read, x)
        torch.testing.assert_close(written, y + change, rtol=1e-4, atol=1e-5)
    assert own.abs().max() > 0


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_in_place_of_the_output(llama, transcoder, level):
    x, y = seen(llama, transcoder)
    levels = transcoder.reconstruct_levels(x)
    with steer(llama, transcoder, method="prefix", level=level, keep_error=False):
        torch.testing.assert_close(seen(llama, transcoder)[1], levels[level], rtol=1e-4, atol=1e-5)
    with steer(llama, transcoder, method="prefix", level=level):
        kept = y - levels[-1] + levels[level]
        torch.testing.assert_close(seen(llama, transcoder)[1], kept, rtol=1e-4, atol=1e-5)


def test_a_gate_reads_the_input(llama, transcoder):
    x, y = seen(llama, transcoder)
    f = transcoder.encode(x)
    fired = (f > 0).flatten(0, 1).float().mean(0)
    gate = int(((fired > 0.1) & (fired < 0.9)).nonzero()[0])
    with steer(llama, transcoder, {2: 1.0}, units="absolute", when=Gate(gate, above=0.0, units="absolute")):
        moved = (seen(llama, transcoder)[1] - y).abs().amax(-1) > 1e-6
    assert torch.equal(moved, f[..., gate] > 0)


def test_what_changes_nothing_is_the_identity_and_generation_with_a_cache_equals_one_without(llama, transcoder):
    plain = logits(llama)
    for change in ({"latents": {3: 0.0}}, {"latents": {3: 1.0}, "method": "scale"}):
        with steer(llama, transcoder, **change):
            assert torch.equal(logits(llama), plain)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    with steer(llama, transcoder, {3: 4.0, 5: -2.0}, method="clamp"):
        cached, whole = (
            llama.generate(IDS, attention_mask=mask, use_cache=use_cache, **options) for use_cache in (True, False)
        )
    assert torch.equal(cached, whole)


def test_outliers_at_either_site_are_left_alone(llama):
    x, y = seen(llama, build(llama))
    for name, hidden in (("norm_limit", x), ("norm_limit_out", y)):
        norms = hidden.norm(dim=-1)
        sae = build(llama, **{name: norms.median().item()})
        with steer(llama, sae, {2: 1.0}, units="absolute"):
            moved = (seen(llama, sae)[1] - y).abs().amax(-1) > 1e-6
        assert torch.equal(moved, norms <= norms.median())


def test_its_constant_shift_is_at_the_output(llama, transcoder):
    shifts = constant_shifts(llama, transcoder, Steering([LatentEdit(4, 2.0, units="absolute")]))
    assert list(shifts) == [resolve_site(llama, WRITTEN)]
    torch.testing.assert_close(*shifts.values(), 2 * transcoder.W_dec[4].detach())


def test_a_place_that_runs_before_is_refused(llama):
    sae = build(llama)
    sae.config.site, sae.config.site_out = sae.config.site_out, sae.config.site
    with steer(llama, sae, {2: 1.0}, units="absolute"), pytest.raises(SteeringError, match="does not run before"):
        logits(llama)
