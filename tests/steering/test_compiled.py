"""Compiled models: an edit acts on them as on others, whatever was compiled and when, and they stay compiled after it.

Torch compiles a model without a look at hooks that come later, so an edit that does nothing is the fault to be found.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

from hf_msae.sites import capture, replace, resolve_site
from hf_msae.steering import random_direction, steer, steer_direction

pytestmark = pytest.mark.slow

IDS = torch.tensor([[1, 5, 9, 33, 8, 60], [1, 17, 3, 3, 42, 7]])


class Counter:
    """A backend of torch.compile that runs graphs as they are, and counts."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run

    def __deepcopy__(self, memo: Any) -> "Counter":  # `generate` copies its configuration
        return self


def compile_model(model: PreTrainedModel, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


def compile_forward(model: PreTrainedModel, backend: Any) -> Any:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def compile_base(model: PreTrainedModel, backend: Any) -> Any:
    model.model.compile(backend=backend)
    return model


def compile_layers(model: PreTrainedModel, backend: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model


def wrap_layers(model: PreTrainedModel, backend: Any) -> Any:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend=backend)
    return model


def wrap(model: PreTrainedModel, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


WAYS: dict[str, Callable[[PreTrainedModel, Any], Any]] = {
    "model.compile": compile_model,
    "model.forward": compile_forward,
    "base model": compile_base,
    "each layer": compile_layers,
    "wrapped layers": wrap_layers,
    "wrapped": wrap,
}


@pytest.fixture(scope="module", params=sorted(WAYS))
def compiled(request: pytest.FixtureRequest, llama) -> tuple[Any, Counter]:
    """A compiled copy of `llama`, which already ran, and what counts its compiled runs."""
    torch.compiler.reset()
    counter = Counter()
    model = WAYS[request.param](copy.deepcopy(llama), counter)
    logits(model)
    assert counter.runs > 0
    return model, counter


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def generated(model: Any, **options: Any) -> Tensor:
    """The logits of each step of a greedy continuation, (batch, steps, vocabulary)."""
    output = model.generate(
        input_ids=IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(output.logits, 1)


def test_steering_acts_on_a_compiled_model_and_leaves_it_compiled(compiled, llama, sae):
    model, counter = compiled
    plain, before = logits(model), counter.runs
    with steer(llama, sae, {1: 3.0}):
        expected = logits(llama)
    with steer(model, sae, {1: 3.0}):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        with steer_direction(model, random_direction("layers.0", 32), 5.0):
            assert not torch.allclose(logits(model), expected, atol=1e-2)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        assert counter.runs == before
    assert not torch.allclose(expected, plain, atol=1e-2)
    assert torch.equal(logits(model), plain)
    assert counter.runs > before


def test_a_model_first_run_while_steered_compiles_without_the_steering(llama, sae):
    torch.compiler.reset()
    counter = Counter()
    model = compile_model(copy.deepcopy(llama), counter)
    with steer(model, sae, {1: 3.0}):
        logits(model)
    torch.testing.assert_close(logits(model), logits(llama), rtol=1e-4, atol=1e-4)
    assert counter.runs > 0


def test_replacing_and_capturing_act_on_a_compiled_model(compiled, llama):
    model, _ = compiled
    here, there = resolve_site(llama, "layers.1"), resolve_site(model, "layers.1")
    expected = capture(llama, [here], input_ids=IDS)[here]
    torch.testing.assert_close(capture(model, [there], input_ids=IDS)[there], expected, rtol=1e-4, atol=1e-4)
    with replace(llama, {here: torch.zeros_like}):
        zeroed = logits(llama)
    with replace(model, {there: torch.zeros_like}):
        torch.testing.assert_close(logits(model), zeroed, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), zeroed, atol=1e-2)


def test_generation_by_a_compiled_model_is_steered(llama, sae):
    torch.compiler.reset()
    model = compile_model(copy.deepcopy(llama), Counter())
    plain = generated(model)
    with steer(llama, sae, {1: 3.0}, positions="generated"):
        expected = generated(llama)
    with steer(model, sae, {1: 3.0}, positions="generated"):
        torch.testing.assert_close(generated(model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-2)


@pytest.mark.parametrize("disable_compile", [True, False])
@pytest.mark.parametrize("positions", ["all", "prompt", "generated", slice(1, 3)])
def test_a_static_cache_compiled_by_generate_itself_is_steered(llama, sae, positions, disable_compile):
    """As on CUDA, where `generate` compiles the steps behind the prompt without being asked."""
    torch.compiler.reset()
    counter = Counter()
    compilation = CompileConfig(backend=counter, fullgraph=False, mode=None)
    compilation._compile_all_devices = True
    model = copy.deepcopy(llama)
    options = {"cache_implementation": "static", "disable_compile": disable_compile, "compile_config": compilation}
    plain = generated(model, **options)
    assert (counter.runs > 0) != disable_compile
    with steer(llama, sae, {1: 3.0}, positions=positions):
        expected = generated(llama, use_cache=False)
    with steer(model, sae, {1: 3.0}, positions=positions):
        torch.testing.assert_close(generated(model, **options), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-2)
    before = counter.runs
    assert torch.equal(generated(model, **options), plain)
    assert (counter.runs > before) != disable_compile


def test_a_function_compiled_around_the_model_is_steered(llama, sae):
    torch.compiler.reset()
    model, counter = copy.deepcopy(llama), Counter()

    @torch.compile(backend=counter)
    def loss(ids: Tensor) -> Tensor:
        return model(input_ids=ids).logits.logsumexp(-1)

    with torch.no_grad():
        plain = loss(IDS)
        with steer(model, sae, {1: 3.0}):
            steered = loss(IDS)
            torch.testing.assert_close(steered, logits(model).logsumexp(-1), rtol=1e-4, atol=1e-4)
        assert counter.runs > 0
        assert not torch.allclose(steered, plain, atol=1e-2)
        assert torch.equal(loss(IDS), plain)


def test_with_the_default_compiler_too(llama, sae):
    """Inductor, which needs a compiler of C++ on the machine."""
    torch.compiler.reset()
    model = copy.deepcopy(llama)
    try:
        model.compile()
        plain = logits(model)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"inductor does not work here: {error}")
    torch.testing.assert_close(plain, logits(llama), rtol=1e-3, atol=1e-3)
    with steer(llama, sae, {1: 3.0}):
        expected = logits(llama)
    with steer(model, sae, {1: 3.0}):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model), plain)
