"""Steering as a context: exact where nothing changes, the same cached or not, alone or in a batch, and private."""

import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from contextvars import copy_context
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_msae.sites import SiteError, capture, resolve_site
from hf_msae.steering import (
    Direction,
    LatentEdit,
    PrefixEdit,
    SteeringError,
    random_direction,
    steer,
    steer_direction,
    steering_context,
)

IDS = torch.tensor([[1, 5, 9, 33, 8, 60], [1, 17, 3, 3, 42, 7]])


def logits(model: Any, input_ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(input_ids) if mask is None else mask
    with torch.no_grad():
        return model(input_ids=input_ids, attention_mask=mask).logits


def generate(model: Any, input_ids: Tensor = IDS, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy continuations and the logits of each step."""
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids) if mask is None else mask,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return output.sequences[:, input_ids.shape[1] :], torch.stack(output.logits, 1)


def hidden_at(model: Any, sae: Any, input_ids: Tensor = IDS, **inputs: Tensor) -> Tensor:
    site = resolve_site(model, sae.config.site)
    return capture(model, [site], input_ids=input_ids, **inputs)[site]


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def ends(edited: Tensor, plain: Tensor) -> Tensor:
    """Which tokens (batch, time) were edited."""
    return (edited != plain).any(-1)


# Exactness


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


# Generation


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", slice(2, 4)])
def test_generation_with_a_cache_equals_generation_without(architecture, decoder, make_sae, positions):
    model = decoder(architecture)
    sae = make_sae(model)
    active = int(sae.encode(hidden_at(model, sae))[:, 1:].sum((0, 1)).argmax())
    edits = [LatentEdit(1, 2.0), LatentEdit(2, 1.0, units="norm")]
    edits += [LatentEdit(active, 0.3, "clamp")] if active > 2 else []
    with steering_context(model, {"": sae}, edits, positions=positions):
        ids, steps = generate(model)
        # Once more in the same context, after another text: what was seen before must not matter.
        logits(model, IDS.flip(0))
        assert torch.equal(generate(model)[1], steps)
        uncached_ids, uncached_steps = generate(model, use_cache=False)
    assert torch.equal(ids, uncached_ids)
    torch.testing.assert_close(steps, uncached_steps, rtol=1e-4, atol=1e-3 if architecture == "mamba" else 1e-4)
    assert not torch.allclose(steps, generate(model)[1], atol=1e-2)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", slice(1, 3), slice(-2, None)])
def test_a_batch_with_padding_equals_its_rows_alone(llama, sae, positions):
    short, long = [1, 5, 9, 33], [1, 17, 3, 30, 42, 7, 8]
    batch = torch.tensor([[0] * 3 + short, long])
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    with steer(llama, sae, {1: 2.0, 20: 0.7}, method="clamp", positions=positions):
        ids, steps = generate(llama, batch, mask)
        for row, tokens in enumerate((short, long)):
            alone_ids, alone_steps = generate(llama, torch.tensor([tokens]))
            assert torch.equal(alone_ids[0], ids[row])
            torch.testing.assert_close(alone_steps[0], steps[row], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steps, generate(llama, batch, mask)[1], atol=1e-2)


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


# Where


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


# Directions


def test_a_direction_is_added_with_its_length(llama, sae):
    plain = hidden_at(llama, sae)
    direction = Direction("layers.1", torch.arange(32.0))
    assert direction.vector.norm().item() == pytest.approx(1)
    with steer_direction(llama, direction, 3.0):
        torch.testing.assert_close(hidden_at(llama, sae)[:, 1:], plain[:, 1:] + 3 * direction.vector)
    with steer_direction(llama, direction, 0.5, units="norm", positions=slice(2, 3)):
        shift = hidden_at(llama, sae) - plain
    torch.testing.assert_close(shift.norm(dim=-1)[:, 2], 0.5 * plain.norm(dim=-1)[:, 2])
    assert shift[:, [0, 1, 3, 4, 5]].abs().max() == 0


# Threads


def test_threads_steer_one_model_each_in_its_own_way(llama, sae):
    edits: list[dict[int, float]] = [{1: 3.0}, {20: 3.0}, {1: -3.0, 7: 2.0}, {}]
    prompts = [IDS[:1], IDS[1:], IDS[:, :4], IDS]

    def run(index: int) -> tuple[Tensor, Tensor]:
        with steer(llama, sae, edits[index]) if edits[index] else nullcontext():
            return generate(llama, prompts[index])

    alone = [run(index) for index in range(4)]
    assert not torch.equal(alone[0][1], generate(llama, prompts[0])[1])
    found: dict[int, list[tuple[Tensor, Tensor]]] = {index: [] for index in range(4)}
    barrier = Barrier(4)

    def work(index: int) -> None:
        barrier.wait()
        found[index].extend(run(index) for _ in range(6))

    before = hooks_on(llama)
    threads = [Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, (ids, steps) in enumerate(alone):
        assert len(found[index]) == 6
        for other_ids, other_steps in found[index]:
            assert torch.equal(other_ids, ids)
            assert torch.equal(other_steps, steps)
    assert hooks_on(llama) == before


@pytest.mark.parametrize(
    ("name", "site"), [("llama", "layers.1.mlp"), ("llama", "layers.1:input"), ("opt", "layers.1.mlp")]
)
def test_threads_that_come_and_go_do_not_disturb_each_other(decoder, make_sae, name, site):
    """At sites inside layers, with texts of other shapes, hooks put up and taken down in the middle of forwards."""
    model = decoder(name)
    sae = make_sae(model, site)
    texts = [torch.arange(3, 7 + 3 * index).repeat(1 + index, 1) for index in range(4)]

    def run(index: int) -> Tensor:
        with steer(model, sae, {1: 3.0 + index}):
            return logits(model, texts[index])

    alone = [run(index) for index in range(4)]
    found: dict[int, list[Tensor]] = {index: [] for index in range(4)}
    threads = [Thread(target=lambda i=i: found[i].extend(run(i) for _ in range(40))) for i in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for index in range(4):
        assert len(found[index]) == 40
        assert all(torch.equal(one, alone[index]) for one in found[index])


def test_one_context_may_be_shared_by_threads_that_copy_it(llama, sae):
    """As `asyncio.to_thread` does: each thread's generation still has a prompt of its own."""
    prompts = [IDS[:, :3], IDS]
    with steer(llama, sae, {1: 3.0}, positions="generated"):
        alone = [generate(llama, prompt)[1] for prompt in prompts]
        results: dict[int, list[Tensor]] = {0: [], 1: []}

        def work(index: int) -> None:
            results[index].extend(generate(llama, prompts[index])[1] for _ in range(5))

        threads = [Thread(target=copy_context().run, args=(work, index)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index in range(2):
        assert len(results[index]) == 5
        assert all(torch.equal(steps, alone[index]) for steps in results[index])


def test_a_thread_started_inside_is_outside(llama, sae):
    plain, seen = logits(llama), []
    with steer(llama, sae, {1: 3.0}):
        thread = Thread(target=lambda: seen.append(logits(llama)))
        thread.start()
        thread.join()
        assert not torch.equal(logits(llama), plain)
    assert torch.equal(seen[0], plain)


def test_a_context_may_close_where_it_did_not_open(llama, sae):
    """As a generator's does that a server advances in one context after another."""
    before = hooks_on(llama)
    stack = ExitStack()
    copy_context().run(stack.enter_context, steer(llama, sae, {1: 3.0}))
    assert hooks_on(llama) > before
    stack.close()
    assert hooks_on(llama) == before


# Errors, and what is left behind


def test_no_hook_survives_an_exception(llama, sae):
    before, plain = hooks_on(llama), logits(llama)

    def fail() -> None:
        with steer(llama, sae, {1: 3.0}), steer(llama, sae, {2: 1.0}):
            assert hooks_on(llama) > before
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    with (
        pytest.raises(SteeringError, match="the mask of positions is"),
        steer(llama, sae, {1: 3.0}, positions=torch.ones(3).bool()),
    ):
        logits(llama)
    assert hooks_on(llama) == before
    assert torch.equal(logits(llama), plain)


CASES: list[tuple[dict[str, Any], str]] = [
    ({"latents": {48: 1.0}}, r"latent 48 is not there; it has latents 0 … 47"),
    ({"latents": {-1: 1.0}}, r"a latent is a whole number from 0, got -1"),
    ({"latents": {"3": 1.0}}, r"a latent is a whole number from 0, got '3'"),
    ({"latents": {3: float("nan")}}, r"latent 3: the value must be a finite number, got nan"),
    ({"latents": {3: 1.0}, "method": "set"}, r"method must be one of add, clamp, ablate, scale, prefix; got 'set'"),
    ({"latents": {3: 1.0}, "units": "sigma"}, r"units out of max, absolute, norm; got method='add', units='sigma'"),
    ({"latents": [3]}, r"method='add' takes a value for each latent, such as \{12: 4.0\}; got \[3\]"),
    ({"latents": [3, 3], "method": "ablate"}, r"latent 3 is edited twice"),
    ({"latents": {3: 1.0}, "level": 1}, r"level and keep_error go with method='prefix'"),
    ({"method": "prefix"}, r"method='prefix' takes a level and no latents; got level=None"),
    ({"method": "prefix", "level": 3}, r"there is no level 3; the SAE has levels 0 … 2, \[8, 24, 48\]"),
    ({"latents": {3: 1.0}, "positions": "answer"}, r"positions must be 'all', 'prompt', 'generated', a slice"),
    ({"latents": {3: 1.0}, "positions": torch.ones(6)}, r"or a bool tensor \(tokens,\) or \(batch, tokens\)"),
    ({"latents": {3: 1.0}, "positions": slice(4, 0, -1)}, r"a slice of the prompt with a positive step"),
]


@pytest.mark.parametrize(("arguments", "said"), CASES)
def test_what_cannot_be_is_refused_on_entering(llama, sae, arguments, said):
    before = hooks_on(llama)
    with pytest.raises(SteeringError, match=said), steer(llama, sae, **arguments):
        pytest.fail("the context must not open")
    assert hooks_on(llama) == before


def test_an_sae_that_does_not_fit_is_refused(llama, sae, make_sae, decoder):
    unmeasured = make_sae(llama)
    unmeasured.max_activation[3] = 0
    with pytest.raises(SteeringError, match="latent 3 has no measured maximum"), steer(llama, unmeasured, {3: 1.0}):
        pytest.fail("the context must not open")
    with steer(llama, unmeasured, {3: 1.0}, units="absolute"):
        assert logits(llama).shape == (2, 6, 64)
    with pytest.raises(SteeringError, match="is in training mode"), steer(llama, unmeasured.train(), {2: 1.0}):
        pytest.fail("the context must not open")
    with pytest.raises(SiteError, match="has no site"), steer(llama, make_sae(decoder("gpt2")), {2: 1.0}):
        pytest.fail("the context must not open")
    inner = make_sae(llama, "layers.1.mlp.down_proj:input")
    inner.config.site = "layers.1"
    with (
        pytest.raises(SteeringError, match=r"of 48 dimensions, but those at .*layers.1:output .* have 32"),
        steer(llama, inner, {2: 1.0}),
    ):
        logits(llama)


def test_edits_that_contradict_each_other_are_refused(llama, sae):
    with (
        pytest.raises(SteeringError, match="a prefix edit goes only with edits that add"),
        steering_context(llama, {"": sae}, [PrefixEdit(0), LatentEdit(30, method="ablate")]),
    ):
        pytest.fail("the context must not open")
    with (
        pytest.raises(SteeringError, match="there is no SAE 'b'; there are 'a'"),
        steering_context(llama, {"a": sae}, [LatentEdit(3, 1.0, sae="b")]),
    ):
        pytest.fail("the context must not open")
    with (
        pytest.raises(SteeringError, match="units must be 'absolute' or 'norm', got 'max'"),
        steer_direction(llama, random_direction("layers.1", 32), 1.0, units="max"),
    ):
        pytest.fail("the context must not open")


# A real language model


def test_a_trained_model_is_steered(stories260k, make_sae: Callable[..., Any]):
    model, tokenizer = stories260k
    sae = make_sae(model, "layers.2")
    inputs = tokenizer("Once upon a time, there was a little dog", return_tensors="pt")
    ids, mask = inputs.input_ids, inputs.attention_mask
    plain = logits(model, ids, mask)
    with steer(model, sae, {3: 0.0}):
        assert torch.equal(logits(model, ids, mask), plain)
    with steer(model, sae, {3: 2.0, 9: 0.5}, method="clamp"):
        cached, steps = generate(model, ids, mask)
        uncached, uncached_steps = generate(model, ids, mask, use_cache=False)
    assert torch.equal(cached, uncached)
    torch.testing.assert_close(steps, uncached_steps, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steps, generate(model, ids, mask)[1], atol=1e-2)
