"""Gates: an edit acts where other latents are active, or behind such tokens, and everything else keeps its bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
from torch import Tensor
from transformers import DynamicCache

from hf_msae.steering import Gate, LatentEdit, SteeringError, steer, steering_context

EDIT = {1: 3.0}


def latents_at(model, sae, input_ids: Tensor = IDS, **inputs: Tensor) -> Tensor:
    """Latents (batch, time, num_latents) of tokens that count: BOS opens no gate."""
    latents = sae.encode(hidden_at(model, sae, input_ids, **inputs))
    return latents * ~torch.isin(input_ids, torch.tensor([0, 1, 2])).unsqueeze(-1)


def rare_latent(model, sae) -> int:
    """One that is active on a token in the middle, not on the first that counts and not everywhere."""
    active = latents_at(model, sae)[..., 2:] > 0
    fits = (active[0, 2:4].any(0)) & ~active[0, :2].any(0) & (active.sum((0, 1)) < 6)
    return 2 + int(fits.nonzero()[0])


@given(
    gates=st.lists(
        st.builds(
            Gate,
            st.integers(0, 47),
            st.sampled_from([0.0, 0.1, 0.5]),
            st.sampled_from(["max", "absolute"]),
            st.sampled_from(["here", "after"]),
        ),
        min_size=1,
        max_size=2,
    ),
    tokens=st.lists(st.lists(st.integers(1, 40), min_size=7, max_size=7), min_size=1, max_size=3),
)
@settings(max_examples=25, deadline=None)
def test_edits_act_exactly_where_all_gates_are_open(llama, sae, gates, tokens):
    """Against the definition, a token at a time."""
    ids = torch.tensor(tokens)
    latents, plain = latents_at(llama, sae, ids), hidden_at(llama, sae, ids)
    with steer(llama, sae, EDIT):
        everywhere = hidden_at(llama, sae, ids)
    with steer(llama, sae, EDIT, when=gates):
        found = hidden_at(llama, sae, ids)
    for row in range(len(ids)):
        for token in range(ids.shape[1]):
            is_open = True
            for gate in gates:
                limit = gate.above * (sae.max_activation[gate.latent] if gate.units == "max" else 1)
                fired = latents[row, :, gate.latent] > limit
                is_open &= bool(fired[token] if gate.then == "here" else fired[:token].any())
            expected = everywhere if is_open else plain
            assert torch.equal(found[row, token], expected[row, token]), (row, token)


@pytest.mark.parametrize("then", ["here", "after"])
def test_logits_before_the_gate_opens_keep_every_bit(architecture, decoder, make_sae, then):
    model = decoder(architecture)
    sae = make_sae(model)
    latent = rare_latent(model, sae)
    fired = latents_at(model, sae)[..., latent] > 0
    plain = logits(model)
    with steer(model, sae, EDIT, when=Gate(latent, then=then)):
        gated, hidden = logits(model), hidden_at(model, sae)
    first = int(fired[0].nonzero()[0]) + (then == "after")
    assert torch.equal(gated[0, :first], plain[0, :first])
    assert not torch.allclose(gated[0, first], plain[0, first], atol=1e-3)
    edited = ends(hidden, hidden_at(model, sae))[0]
    assert edited.any()
    assert not edited[:first].any()


def test_a_text_without_the_concept_is_written_to_the_bit(llama, sae):
    silent = int((latents_at(llama, sae).amax((0, 1)) == 0).nonzero()[0])
    plain = generate(llama)
    with steer(llama, sae, EDIT, when=Gate(silent, above=1e6, units="absolute", then="after")):
        ids, steps = generate(llama)
    assert torch.equal(ids, plain[0])
    assert torch.equal(steps, plain[1])


@pytest.mark.parametrize("positions", ["all", "generated"])
@pytest.mark.parametrize("then", ["here", "after"])
def test_generation_with_a_cache_equals_generation_without(architecture, decoder, make_sae, then, positions):
    model = decoder(architecture)
    sae = make_sae(model)
    gate = Gate(rare_latent(model, sae), then=then)
    with steer(model, sae, EDIT, when=gate, positions=positions):
        steps = check_cached_as_uncached(model, atol=1e-3 if architecture == "mamba" else 1e-4)
    if then == "after":
        assert not torch.allclose(steps, generate(model)[1], atol=1e-3)


@pytest.mark.parametrize("then", ["here", "after"])
def test_a_batch_with_padding_equals_its_rows_alone(llama, sae, then):
    gate = Gate(int((latents_at(llama, sae)[0, 1:3] > 0).any(0).nonzero()[0]), then=then)
    with steer(llama, sae, EDIT, when=gate):
        steps = check_batch_as_rows(llama)
    assert not torch.allclose(steps, generate(llama, BATCH, MASK)[1], atol=1e-3)


def test_a_prompt_in_chunks_and_several_answers_see_what_came_before(llama, sae):
    gate = Gate(rare_latent(llama, sae), then="after")
    with steer(llama, sae, EDIT, when=gate):
        ids, steps = generate(llama)
        chunked_ids, chunked_steps = generate(llama, prefill_chunk_size=2)
        many = llama.generate(
            IDS[:1],
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=True,
            num_return_sequences=3,
            pad_token_id=0,
            top_k=1,
        )
    assert torch.equal(ids, chunked_ids)
    torch.testing.assert_close(steps, chunked_steps, rtol=1e-4, atol=1e-4)
    assert torch.equal(many[:, IDS.shape[1] :], ids[:1].expand(3, -1))


def test_gates_read_the_activation_before_any_edit(llama, sae):
    latent = rare_latent(llama, sae)
    with steer(llama, sae, EDIT):
        everywhere = hidden_at(llama, sae)
    fired = latents_at(llama, sae)[..., latent] > 0
    edits = [LatentEdit(1, 3.0, when=Gate(latent)), LatentEdit(latent, method="ablate")]
    with steering_context(llama, {"": sae}, edits):
        found = hidden_at(llama, sae)
    own = (sae.encode(hidden_at(llama, sae)) * fired.unsqueeze(-1))[..., latent, None] * sae.W_dec[latent]
    torch.testing.assert_close(found[fired], (everywhere - own)[fired], rtol=1e-5, atol=1e-5)


def test_latents_that_are_ablated_wait_for_their_gate_too(llama, sae):
    latent, plain = rare_latent(llama, sae), hidden_at(llama, sae)
    opened = latents_at(llama, sae)[..., latent] > 0
    others = [other for other in range(8) if other != latent]
    with steer(llama, sae, others, method="ablate"):
        everywhere = hidden_at(llama, sae)
    with steer(llama, sae, others, method="ablate", when=Gate(latent)):
        found = hidden_at(llama, sae)
    assert not torch.equal(everywhere[~opened], plain[~opened])
    assert torch.equal(found[~opened], plain[~opened])
    assert torch.equal(found[opened], everywhere[opened])


def test_outliers_open_no_gate(llama, make_sae):
    sae = make_sae(llama)
    latent = rare_latent(llama, sae)
    sae.config.norm_limit = 1e-6
    for then in ("here", "after"):
        with steer(llama, sae, EDIT, when=Gate(latent, then=then)):
            assert torch.equal(logits(llama), steered_nowhere(llama))


def steered_nowhere(model) -> Tensor:
    """Logits while nothing is steered."""
    from contextvars import Context

    return Context().run(logits, model)


def test_beams_and_texts_that_began_elsewhere_are_refused_where_memory_is_needed(llama, sae):
    latent = rare_latent(llama, sae)
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(input_ids=IDS, past_key_values=cache)
    with steer(llama, sae, EDIT, when=Gate(latent, then="after")):
        with pytest.raises(SteeringError, match="got 2"):
            llama.generate(IDS, num_beams=2, max_new_tokens=3, pad_token_id=0)
        with pytest.raises(SteeringError, match="empty cache inside"):
            llama(input_ids=IDS[:, :1], past_key_values=cache)
    with steer(llama, sae, EDIT, when=Gate(latent)):
        llama.generate(IDS, num_beams=2, max_new_tokens=3, pad_token_id=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent": -1}, "whole number from 0, got -1"),
        ({"latent": 1.5}, "whole number from 0"),
        ({"latent": 1, "above": -0.5}, "finite number from 0, got -0.5"),
        ({"latent": 1, "above": float("inf")}, "finite number"),
        ({"latent": 1, "units": "norm"}, "units out of max, absolute"),
        ({"latent": 1, "then": "before"}, "then out of here, after"),
    ],
)
def test_what_is_no_gate_is_refused(arguments, message):
    with pytest.raises(SteeringError, match=message):
        Gate(**arguments)


def test_gates_that_the_sae_does_not_have_are_refused_on_entering(llama, make_sae):
    sae = make_sae(llama)
    sae.max_activation[4] = 0
    for gate, message in ((Gate(48), "0 … 47"), (Gate(4, above=0.5), "no measured maximum")):
        with pytest.raises(SteeringError, match=message), steer(llama, sae, EDIT, when=gate):
            pass
    with steer(llama, sae, EDIT, when=Gate(4)):
        pass
    with pytest.raises(SteeringError, match="takes a Gate or several"):
        LatentEdit(1, 1.0, when=4)
    with (
        pytest.raises(SteeringError, match="acts everywhere"),
        steer(llama, sae, method="prefix", level=0, when=Gate(4)),
    ):
        pass
