"""What a process has but once: in force while anybody holds it, and put back; no thread disturbs another."""

import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import A_MOMENT, HANG_SECONDS
from small_saes import copying_sae
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel

from hf_msae import MatryoshkaSAE, process_wide
from hf_msae.cross_entropy import measure_cross_entropy
from hf_msae.data import TokenWindows, collate
from hf_msae.interpret.effects import LogitEffects
from hf_msae.language_models import count_parameters, load_language_model
from hf_msae.sites import capture, resolve_site

pytestmark = pytest.mark.slow


def compiled_calls(function: Callable[[Tensor], Tensor]) -> Callable[[], bool]:
    """Whether a compiled function runs compiled now."""
    seen: list[int] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            seen.append(1)
            return graph.forward(*args)

        return run

    compiled = torch.compile(function, backend=backend)

    def runs_compiled() -> bool:
        seen.clear()
        compiled(torch.ones(2))
        return bool(seen)

    return runs_compiled


RUNS_COMPILED = compiled_calls(lambda x: x + 1)


def bars_of_datasets() -> bool:
    from datasets import are_progress_bars_disabled

    return not are_progress_bars_disabled()


def warns_of_data() -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn("It seems that you are about to commit a data file (a.parquet)", stacklevel=1)
    return bool(caught)


# Each with what tells that it is not in force.
HELD: dict[str, tuple[Callable[[], AbstractContextManager[None]], Callable[[], bool]]] = {
    "eager": (process_wide.eager, RUNS_COMPILED),
    "transformers": (process_wide.no_transformers_bars, process_wide.transformers_logging.is_progress_bar_enabled),
    "datasets": (process_wide.no_datasets_bars, bars_of_datasets),
    "warning": (process_wide.no_data_warning, warns_of_data),
}


@pytest.mark.filterwarnings("always:It seems")
@pytest.mark.parametrize("name", sorted(HELD))
@given(st.lists(st.integers(0, 3), min_size=1, max_size=10))
@settings(max_examples=15, deadline=None)
def test_a_setting_is_in_force_exactly_while_anybody_holds_it(name, moves):
    """Four holders enter and leave in any order, as threads do."""
    hold, is_off = HELD[name]
    assert is_off()
    holders: dict[int, ExitStack] = {}
    try:
        for holder in moves:
            if holder in holders:
                holders.pop(holder).close()
            else:
                holders[holder] = ExitStack()
                holders[holder].enter_context(hold())
            assert is_off() == (not holders)
    finally:
        for stack in holders.values():
            stack.close()
    assert is_off()


def test_a_setting_of_the_callers_own_is_put_back():
    with torch.compiler.set_stance("force_eager"):
        with process_wide.eager():
            assert not RUNS_COMPILED()
        assert not RUNS_COMPILED()
    assert RUNS_COMPILED()


def in_thread(work: Callable[[], Any]) -> Callable[..., Any]:
    """Starts the work in another thread; the function returned waits for it and hands on what it gave or raised."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def outcome(timeout: float | None = None) -> Any:
        thread.join(timeout)
        if found and isinstance(found[0], BaseException):
            raise found[0]
        return found[0] if found else None

    return outcome


def amid(module: nn.Module, event: Callable[[], None]) -> Any:
    """Calls `event` once, when this thread runs the module; returns the hook's handle."""
    here, done = threading.get_ident(), []

    def hook(*_: Any) -> None:
        if threading.get_ident() == here and not done:
            done.append(True)
            event()

    return module.register_forward_pre_hook(hook)


ACTIONS = ("forward", "capture", "effects", "recovered")


@pytest.fixture(scope="module")
def actions(lm, tokenizer, texts) -> dict[str, Callable[[], Any]]:
    """What runs a model with hooks on it, and a user's own forward."""
    last, ids = resolve_site(lm, "layers.-1"), torch.tensor([[1, 5, 9, 33, 8]])
    batch = collate(list(TokenWindows(texts[:4], tokenizer, context_length=24)), 0)
    directions, references = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))

    def forward() -> Tensor:
        with torch.no_grad():
            return lm(input_ids=ids).logits

    def recovered() -> Tensor:
        measured = measure_cross_entropy(lm, last, copying_sae(0.5), torch.ones(16), [batch])
        return torch.tensor([measured.ce_clean, measured.ce_zero, measured.ce_mean, measured.levels[-1].ce_recovered])

    return {
        "forward": forward,
        "capture": lambda: capture(lm, [last], input_ids=ids)[last],
        "effects": lambda: LogitEffects(lm, directions, references).mapped,
        "recovered": recovered,
    }


@pytest.mark.parametrize("inner", ACTIONS)
@pytest.mark.parametrize("outer", ACTIONS)
def test_one_action_in_the_middle_of_another_gives_what_each_gives_alone(lm, actions, outer, inner):
    alone = {name: actions[name]() for name in (outer, inner)}
    waiting: list[Callable[..., Any]] = []

    def meanwhile() -> None:
        waiting.append(in_thread(actions[inner]))
        waiting[0](timeout=A_MOMENT)  # it may have to wait for the outer one

    handle = amid(lm.model.layers[0], meanwhile)
    try:
        found = actions[outer]()
        assert torch.equal(waiting[0](timeout=HANG_SECONDS), alone[inner])
    finally:
        handle.remove()
    assert torch.equal(found, alone[outer])


# Models made at once

MADE = ("sae", "language model", "its size")


@pytest.fixture(scope="module")
def making(tmp_path_factory, tokenizer) -> dict[str, Callable[[], list[Any]]]:
    """What makes a model, with what comes out: of its own precision, and tied."""
    root = tmp_path_factory.mktemp("models")
    copying_sae(0.5).save_pretrained(root / "sae")
    config = LlamaConfig(
        vocab_size=80,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(root / "lm")
    tokenizer.save_pretrained(root / "lm")

    def language_model() -> list[Any]:
        model, _ = load_language_model(root / "lm", dtype=torch.bfloat16)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return [*model.state_dict().values(), *model.buffers(), tied]

    return {
        "sae": lambda: list(MatryoshkaSAE.from_pretrained(root / "sae").state_dict().values()),
        "language model": language_model,
        "its size": lambda: [count_parameters(root / "lm", config)],
    }


@pytest.mark.parametrize("inner", MADE)
@pytest.mark.parametrize("outer", MADE)
def test_a_model_made_while_another_is_being_made_is_what_it_is_alone(making, monkeypatch, outer, inner):
    """The second begins in the midst of the first, and would end after it."""
    alone = {name: making[name]() for name in (outer, inner)}
    state = torch.get_default_dtype(), PreTrainedModel.tie_weights, torch.linspace
    here = threading.get_ident()
    in_midst, outer_done = threading.Event(), threading.Event()
    waiting: list[Callable[..., Any]] = []

    def event() -> None:
        if threading.get_ident() != here:
            in_midst.set()
            outer_done.wait(HANG_SECONDS)
        elif not waiting:
            waiting.append(in_thread(making[inner]))
            in_midst.wait(A_MOMENT)  # which it never is where it has to wait

    for kind in (MatryoshkaSAE, LlamaModel):

        def init(self: Any, *args: Any, real: Any = kind.__init__, **kwargs: Any) -> None:
            event()
            real(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", init)
    found = [making[outer]()]
    outer_done.set()
    found.append(waiting[0](timeout=HANG_SECONDS))
    monkeypatch.undo()
    for made, name in zip(found, (outer, inner), strict=True):
        for one, expected in zip(made, alone[name], strict=True):
            assert (
                torch.equal(one, expected) and one.dtype == expected.dtype
                if isinstance(one, Tensor)
                else (one == expected)
            )
    assert (torch.get_default_dtype(), PreTrainedModel.tie_weights, torch.linspace) == state
