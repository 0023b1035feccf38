"""What edits change of an activation: exactly what the formulas say, and nothing where that is nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steered_runs import IDS, ends, generate, hidden_at, logits
from torch import Tensor, nn

from hf_msae.steering import (
    LatentEdit,
    PrefixEdit,
    random_direction,
    steer,
    steer_direction,
    steering_context,
)


def test_what_changes_nothing_leaves_every_bit(architecture, decoder, make_sae):
    model = decoder(architecture)
    sae = make_sae(model)
    plain, (_, plain_steps) = logits(model), generate(model)
    latents = sae.encode(hidden_at(model, sae))
    row, token, active = (latents[:, 1:] > 0).nonzero()[0].tolist()
    own = latents[row, token + 1, active].item()
    silent = int((latents.amax((0, 1)) == 0).nonzero()[0])
    identities = [
        steer(model, sae, {3: 0.0, 5: 0.0}),
        steer(model, sae, {3: 0.0}, units="norm"),
        steer(model, sae, {active: 1.0}, method="scale"),
        steer(model, sae, {silent: 7.0}, method="scale"),
        steer(model, sae, [silent], method="ablate"),
        steer(model, sae, {active: own}, method="clamp", units="absolute", positions=own_token(row, token + 1)),
        steer(model, sae, method="prefix", level=-1),
        steer(model, sae, {active: 4.0}, positions=slice(0, 0)),
        steer(model, sae, {active: 4.0}, positions="generated"),
        steer_direction(model, random_direction("layers.1", 32), 0.0),
    ]
    for index, context in enumerate(identities):
        with context:
            assert torch.equal(logits(model), plain), index
    with steer(model, sae, {3: 0.0}), steer(model, sae, [silent], method="ablate", positions="prompt"):
        assert torch.equal(generate(model)[1], plain_steps)


@pytest.mark.parametrize(
    "edit",
    [
        *(LatentEdit(5, 2.0, method, "absolute") for method in ("add", "clamp", "ablate", "scale")),
        LatentEdit(5, 2.0, units="norm"),
        PrefixEdit(0),
        PrefixEdit(0, keep_error=False),
    ],
    ids=lambda edit: getattr(edit, "method", f"prefix {edit}"),
)
def test_outliers_are_left_as_they_are_and_all_else_is_edited(llama, make_sae, edit):
    """Attention sinks and such, beyond the norm of what the SAE was trained on: as in training and in every metric."""
    sae = make_sae(llama)
    plain = hidden_at(llama, sae)
    with steering_context(llama, {"": sae}, [edit]):
        everywhere = hidden_at(llama, sae)
    sae.config.norm_limit = plain.norm(dim=-1).median().item()
    with steering_context(llama, {"": sae}, [edit]):
        found = hidden_at(llama, sae)
    inlying = plain.norm(dim=-1) <= sae.config.norm_limit
    assert 3 < inlying.sum() < inlying.numel() - 3
    assert ends(everywhere, plain)[~inlying].any()
    assert torch.equal(found, torch.where(inlying.unsqueeze(-1), everywhere, plain))


def own_token(row: int, token: int) -> Tensor:
    mask = torch.zeros(IDS.shape, dtype=torch.bool)
    mask[row, token] = True
    return mask


def test_a_clamped_latent_stands_at_its_value_and_the_rest_of_the_activation_stays(llama, sae):
    plain = hidden_at(llama, sae)
    own = sae.encode(plain)
    latent = int((own[:, 1:] > 0).sum((0, 1)).argmax())
    with steer(llama, sae, {latent: 2.5}, method="clamp", units="absolute"):
        clamped = hidden_at(llama, sae)
    change = (2.5 - own[..., latent : latent + 1]) * sae.W_dec[latent]
    change[:, 0] = 0  # BOS
    torch.testing.assert_close(clamped, plain + change, rtol=1e-5, atol=1e-5)
    with steer(llama, sae, {latent: 2.0}, method="clamp", units="max"):
        in_maxima = hidden_at(llama, sae)
    value = 2 * sae.max_activation[latent].item()
    with steer(llama, sae, {latent: value}, method="clamp", units="absolute"):
        assert torch.equal(hidden_at(llama, sae), in_maxima)


@given(st.floats(-50, 50).filter(bool), st.integers(0, 47))
@settings(max_examples=25, deadline=None)
def test_adding_shifts_by_exactly_the_row(llama, sae, value, latent):
    plain = hidden_at(llama, sae)
    with steer(llama, sae, {latent: value}, units="absolute"):
        shifted = hidden_at(llama, sae)
    assert torch.equal(shifted[:, 1:], plain[:, 1:] + torch.tensor(value) * sae.W_dec[latent])
    assert torch.equal(shifted[:, 0], plain[:, 0])


@pytest.mark.parametrize("length", [1.0, 2.5])
def test_units(llama, make_sae, length):
    """Rows of other libraries' SAEs are not of length one, and a unit of the norm is one whatever the row's length."""
    sae = make_sae(llama)
    sae.W_dec.data[7] *= length / sae.W_dec[7].norm()
    plain = hidden_at(llama, sae)[:, 1:]
    row, largest = sae.W_dec[7], sae.max_activation[7]
    with steer(llama, sae, {7: 3.0}, units="max"):
        torch.testing.assert_close(hidden_at(llama, sae)[:, 1:] - plain, (3 * largest * row).expand_as(plain))
    with steer(llama, sae, {7: -0.5}, units="norm"):
        shift = hidden_at(llama, sae)[:, 1:] - plain
    torch.testing.assert_close(shift.norm(dim=-1), 0.5 * plain.norm(dim=-1))
    torch.testing.assert_close(nn.functional.cosine_similarity(shift, row, -1), -torch.ones(plain.shape[:2]))


def test_ablating_is_clamping_to_zero_and_scaling_by_zero(llama, sae):
    latents = sae.encode(hidden_at(llama, sae))[:, 1:]
    three = latents.sum((0, 1)).topk(3).indices.tolist()
    with steer(llama, sae, three, method="ablate"):
        ablated = logits(llama)
    assert not torch.allclose(ablated, logits(llama), atol=1e-2)
    for method in ("clamp", "scale"):
        with steer(llama, sae, dict.fromkeys(three, 0.0), method=method, units="absolute"):
            torch.testing.assert_close(logits(llama), ablated, rtol=1e-5, atol=1e-5)


def test_ablating_a_latent_leaves_tokens_where_it_is_silent_to_the_bit(llama, sae):
    plain = hidden_at(llama, sae)
    own = sae.encode(plain)
    active = own > 0
    active[:, 0] = False
    latent = int(((active.sum((0, 1)) > 0) & (active.sum((0, 1)) < 10)).nonzero()[0])
    with steer(llama, sae, [latent], method="ablate"):
        assert torch.equal(ends(hidden_at(llama, sae), plain), active[..., latent])


def test_several_latents_add_what_each_adds(llama, sae):
    plain = hidden_at(llama, sae)
    edits = [LatentEdit(2, 1.5), LatentEdit(9, -2.0, units="norm"), LatentEdit(30, 3.0, "clamp", "absolute")]
    edits += [LatentEdit(11, method="ablate"), LatentEdit(40, 0.5, "scale")]
    alone = torch.zeros_like(plain)
    for edit in edits:
        with steering_context(llama, {"": sae}, [edit]):
            alone += hidden_at(llama, sae) - plain
    with steering_context(llama, {"": sae}, edits):
        together = hidden_at(llama, sae) - plain
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_level_keeps_its_latents_with_or_without_the_error(llama, sae):
    plain = hidden_at(llama, sae)
    latents = sae.encode(plain)
    whole = sae.decode(latents)
    for level, size in enumerate(sae.config.prefix_sizes):
        kept = sae.decode(latents, prefix=size)
        with steer(llama, sae, method="prefix", level=level):
            torch.testing.assert_close(
                hidden_at(llama, sae)[:, 1:], (kept + plain - whole)[:, 1:], rtol=1e-4, atol=1e-4
            )
        with steer(llama, sae, method="prefix", level=level, keep_error=False):
            torch.testing.assert_close(hidden_at(llama, sae)[:, 1:], kept[:, 1:], rtol=1e-4, atol=1e-4)
    with steer(llama, sae, list(range(8, 48)), method="ablate"):
        by_latents = hidden_at(llama, sae)
    with steer(llama, sae, method="prefix", level=0):
        torch.testing.assert_close(hidden_at(llama, sae), by_latents, rtol=1e-4, atol=1e-4)


def test_a_tokenized_sae_steers_by_its_latents_and_replaces_nothing(llama, sae, make_sae):
    """Its tokens' vectors are no latent's: edits do what those of the plain SAE do, or are refused."""
    tokenized = make_sae(llama, lookup_size=llama.config.vocab_size)
    torch.nn.init.normal_(tokenized.W_token)
    for edits in ({"latents": {3: 2.0}}, {"latents": [2, 9], "method": "ablate"}, {"method": "prefix", "level": 0}):
        with steer(llama, sae, **edits):
            plain = hidden_at(llama, sae)
        with steer(llama, tokenized, **edits):
            assert torch.equal(hidden_at(llama, tokenized), plain)
    refused = pytest.raises(ValueError, match=r"of which the token's own vector is a part here.*leave keep_error true")
    with refused, steer(llama, tokenized, method="prefix", level=0, keep_error=False):
        pass


@pytest.mark.parametrize(
    "changes",
    [{"activation": "relu"}, {"activation": "topk", "inference": "topk"}, {"apply_b_dec_to_input": False}],
)
def test_latents_are_those_that_the_sae_encodes(llama, make_sae, changes):
    other = make_sae(llama, **changes)
    plain = hidden_at(llama, other)
    own = other.encode(plain)
    chosen = own[:, 1:].sum((0, 1)).topk(4).indices.tolist()
    with steer(llama, other, chosen, method="ablate"):
        ablated = hidden_at(llama, other)
    expected = plain - own[..., chosen] @ other.W_dec[chosen]
    torch.testing.assert_close(ablated[:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-5)


def test_several_saes_and_sites_act_together_and_nested(llama, sae, make_sae):
    early, same = make_sae(llama, "layers.0", seed=3), make_sae(llama, seed=4)
    edits = [LatentEdit(4, 2.0, sae="early"), LatentEdit(5, 2.0, sae="late"), LatentEdit(6, 1.0, sae="same")]
    plain = logits(llama)
    with steering_context(llama, {"early": early, "late": sae, "same": same}, edits):
        together, hidden = logits(llama), hidden_at(llama, early)
    with steer(llama, early, {4: 2.0}), steer(llama, sae, {5: 2.0}), steer(llama, same, {6: 1.0}):
        torch.testing.assert_close(logits(llama), together, rtol=1e-5, atol=1e-5)
        assert torch.equal(hidden_at(llama, early), hidden)
    with steer(llama, early, {4: 2.0}):
        assert not torch.allclose(logits(llama), together, atol=1e-3)
    assert torch.equal(logits(llama), plain)


def test_half_precision_models_keep_their_precision_and_unsteered_bits(make_sae, decoder):
    import copy

    model = copy.deepcopy(decoder("llama")).to(torch.bfloat16)
    half_sae = make_sae(decoder("llama"))
    plain = hidden_at(model, half_sae)
    with steer(model, half_sae, {3: 1.0}, positions=slice(2, 3)):
        edited = hidden_at(model, half_sae)
    assert edited.dtype == torch.bfloat16
    assert ends(edited, plain).tolist() == [[False, False, True, False, False, False]] * 2
    shift = half_sae.max_activation[3] * half_sae.W_dec[3]
    assert torch.equal(edited[:, 2], (plain[:, 2].float() + shift).to(torch.bfloat16))
