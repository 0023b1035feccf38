"""Which tokens are steered: the same cached or not, alone or in a batch, never padding and special tokens."""

import pytest
import torch
from steered_runs import (
    BATCH,
    IDS,
    MASK,
    check_batch_as_rows,
    check_cached_as_uncached,
    ends,
    generate,
    hidden_at,
    logits,
)

from hf_msae.sites import capture, resolve_site
from hf_msae.steering import (
    LatentEdit,
    steer,
    steering_context,
)
from hf_msae.steering.positions import _real_tokens


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", slice(2, 4)])
def test_generation_with_a_cache_equals_generation_without(architecture, decoder, make_sae, positions):
    model = decoder(architecture)
    sae = make_sae(model)
    active = int(sae.encode(hidden_at(model, sae))[:, 1:].sum((0, 1)).argmax())
    edits = [LatentEdit(1, 2.0), LatentEdit(2, 1.0, units="norm")]
    edits += [LatentEdit(active, 0.3, "clamp")] if active > 2 else []
    with steering_context(model, {"": sae}, edits, positions=positions):
        steps = check_cached_as_uncached(model, atol=1e-3 if architecture == "mamba" else 1e-4)
    assert not torch.allclose(steps, generate(model)[1], atol=1e-2)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", slice(1, 3), slice(-2, None)])
def test_a_batch_with_padding_equals_its_rows_alone(llama, sae, positions):
    with steer(llama, sae, {1: 2.0, 20: 0.7}, method="clamp", positions=positions):
        steps = check_batch_as_rows(llama)
    assert not torch.allclose(steps, generate(llama, BATCH, MASK)[1], atol=1e-2)


@pytest.mark.parametrize("positions", ["prompt", "generated"])
def test_a_prompt_that_begins_with_the_last_one_is_a_prompt_of_its_own(llama, sae, positions):
    with steer(llama, sae, {1: 3.0}, positions=positions):
        expected, steps = logits(llama), generate(llama)[1]
    with steer(llama, sae, {1: 3.0}, positions=positions):
        logits(llama, IDS[:, :3])
        assert torch.equal(logits(llama), expected)
        # The last forward of this sees five tokens, and the next prompt has six.
        generate(llama, IDS[:, :1])
        assert torch.equal(generate(llama)[1], steps)


def test_a_static_cache_steers_the_same(llama, sae):
    with steer(llama, sae, {1: 2.0}, positions="generated"):
        ids, steps = generate(llama)
        static_ids, static_steps = generate(llama, cache_implementation="static", disable_compile=True)
    assert torch.equal(ids, static_ids)
    torch.testing.assert_close(steps, static_steps, rtol=1e-4, atol=1e-4)


def test_steering_only_generated_tokens_leaves_the_first_step_and_only_the_prompt_steers_it(llama, sae):
    plain = generate(llama)[1]
    with steer(llama, sae, {1: 3.0}, positions="generated"):
        steps = generate(llama)[1]
    assert torch.equal(steps[:, 0], plain[:, 0])
    assert not torch.allclose(steps[:, 1], plain[:, 1], atol=1e-2)
    with steer(llama, sae, {1: 3.0}, positions="prompt"):
        assert not torch.allclose(generate(llama)[1][:, 0], plain[:, 0], atol=1e-2)


def test_padding_and_special_tokens_are_never_steered(llama, sae):
    ids = torch.tensor([[0, 0, 1, 5, 2, 9], [1, 17, 3, 3, 42, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    plain = hidden_at(llama, sae, ids, attention_mask=mask)
    with steer(llama, sae, {3: 2.0}):
        edited = hidden_at(llama, sae, ids, attention_mask=mask)
    # BOS is 1, EOS 2, padding 0.
    assert ends(edited, plain).int().tolist() == [[0, 0, 0, 1, 0, 1], [0, 1, 1, 1, 1, 1]]
    with steer(llama, sae, {3: 2.0}, special_ids={17, 3}):
        edited = hidden_at(llama, sae, ids, attention_mask=mask)
    assert ends(edited, plain).int().tolist() == [[0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("prompt", [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]),
        ("generated", [[0] * 6, [0] * 6]),
        (slice(1, 3), [[0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0]]),
        (slice(-1, None), [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1]]),
        (slice(None, None, 2), [[0, 0, 0, 0, 1, 0], [0, 0, 1, 0, 1, 0]]),
        (torch.tensor([1, 0, 0, 1, 0, 1]).bool(), [[0, 0, 0, 1, 0, 1], [0, 0, 0, 1, 0, 1]]),
        (torch.tensor([[1] * 6, [0, 0, 0, 0, 1, 0]]).bool(), [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 0]]),
    ],
)
def test_positions_in_the_prompt_are_counted_without_its_padding(llama, sae, positions, expected):
    ids = torch.tensor([[0, 0, 1, 5, 8, 9], [1, 17, 3, 3, 42, 7]])
    mask = (ids != 0).long()
    plain = hidden_at(llama, sae, ids, attention_mask=mask)
    with steer(llama, sae, {3: 2.0}, positions=positions):
        assert ends(hidden_at(llama, sae, ids, attention_mask=mask), plain).int().tolist() == expected


def test_the_base_model_and_sites_inside_layers_are_steered_too(decoder, make_sae):
    model = decoder("opt")
    sae = make_sae(model, "layers.1.mlp")
    plain = hidden_at(model, sae)
    with steer(model, sae, {3: 2.0}):
        shift = hidden_at(model, sae) - plain
        through_head = logits(model)
        with torch.no_grad():
            inner = model.base_model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    torch.testing.assert_close(shift[:, 1:], (2 * sae.max_activation[3] * sae.W_dec[3]).expand(2, 5, -1))
    assert shift[:, 0].abs().max() == 0
    torch.testing.assert_close(model.lm_head(inner), through_head)


def test_embeddings_given_instead_of_tokens_are_steered_where_they_are_no_padding(llama, sae):
    embeds = llama.get_input_embeddings()(IDS).detach()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    site = resolve_site(llama, sae.config.site)
    plain = capture(llama, [site], inputs_embeds=embeds, attention_mask=mask)[site]
    with steer(llama, sae, {3: 2.0}):
        edited = capture(llama, [site], inputs_embeds=embeds, attention_mask=mask)[site]
    assert ends(edited, plain).int().tolist() == mask.tolist()


@pytest.mark.parametrize("past", [0, 3])
def test_all_forms_of_an_attention_mask_say_the_same_of_padding(past):
    """Of tokens, of tokens by tokens (Booleans, numbers, what is added to scores), and one for each kind of layer."""
    generator = torch.Generator().manual_seed(past)
    whole = torch.rand(4, past + 5, generator=generator) > 0.4
    expected, shape = whole[:, past:], torch.Size((4, 5))
    causal = torch.ones(past + 5, past + 5, dtype=torch.bool).tril()[past:]
    seen = (causal & whole[:, None])[:, None]
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    forms = [whole, whole.long(), whole.float(), seen, seen.int(), added, {"full": "causal", "sliding": added}]
    for mask in forms:
        assert torch.equal(_real_tokens(mask, shape, past, torch.device("cpu")), expected)
    assert _real_tokens(None, shape, past, torch.device("cpu")).all()
    for unknown in (whole[:, :4], added[..., : past + 4], added[:, :, :4], "causal"):
        assert _real_tokens(unknown, shape, past, torch.device("cpu")) is None
