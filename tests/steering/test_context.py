"""Steering as a context: private to its thread, gone when it closes, and refused where it cannot be."""

import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from contextvars import copy_context
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from steered_runs import IDS, generate, hidden_at, hooks_on, logits
from torch import Tensor

from hf_msae.sites import SiteError
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
