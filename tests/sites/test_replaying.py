"""Layers before a site, replayed: the same logits to the bit, without a look at them, in one thread alone."""

import copy
import threading
from contextlib import ExitStack, contextmanager

import pytest
import torch
from tiny_models import DECODERS, build, tiny
from torch import Tensor
from transformers import PreTrainedModel

from hf_msae.sites import Site, in_this_thread, replace, resolve_site
from hf_msae.sites.replaying import layers_before, recorded, replayed

IDS, OTHERS = torch.tensor([[1, 5, 9, 33, 8, 60], [1, 17, 3, 3, 42, 7]]), torch.tensor([[1, 4, 11, 29, 50, 6]] * 2)
SITE = "layers.2"


@torch.no_grad()
def logits(model: PreTrainedModel, shift: float = 0.0, ids: Tensor = IDS) -> Tensor:
    with replace(model, {resolve_site(model, SITE): lambda hidden: hidden + shift}, in_this_thread()):
        return model(ids, use_cache=False).logits


def record(model: PreTrainedModel, site: str = SITE) -> dict:
    with recorded(layers_before(model, resolve_site(model, site))) as outputs:
        logits(model)
    return outputs


@contextmanager
def counted(layers):
    """How often anything in some layers computes."""
    calls: list[str] = []
    with ExitStack() as stack:
        for layer in layers:
            for name, module in layer.named_modules():
                if name:
                    stack.callback(module.register_forward_hook(lambda *_, name=name: calls.append(name)).remove)
        yield calls


@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_the_whole_pass_and_earlier_layers_do_not_run(name: str) -> None:
    model = tiny(name)
    outputs = record(model)
    assert len(outputs) == 2
    whole = {shift: logits(model, shift) for shift in (0.0, 0.7)}
    assert not torch.equal(whole[0.0], whole[0.7])
    with counted(outputs) as calls, replayed(outputs):
        for shift, expected in whole.items():
            assert torch.equal(logits(model, shift), expected)
        assert calls == []
    with counted(outputs) as calls:
        assert torch.equal(logits(model, 0.7), whole[0.7])
        assert calls


def test_derivatives_are_those_of_the_whole_pass() -> None:
    model = tiny("llama")
    outputs, slopes = record(model), []
    for replay in ({}, outputs):
        shift = torch.full((32,), 0.1, requires_grad=True)
        edit = {resolve_site(model, SITE): lambda hidden, shift=shift: hidden + shift}
        with replace(model, edit), replayed(replay):
            model(IDS, use_cache=False).logits.square().sum().backward()
        slopes.append(shift.grad)
    assert torch.equal(*slopes)


def test_another_thread_computes_its_own() -> None:
    model = tiny("llama")
    outputs, expected, found = record(model), logits(model, 0.7, OTHERS), []
    with replayed(outputs):
        thread = threading.Thread(target=lambda: found.append(logits(model, 0.7, OTHERS)))
        thread.start()
        thread.join()
        mine = logits(model, 0.7)
    assert torch.equal(found[0], expected)
    assert torch.equal(mine, logits(model, 0.7))


def test_two_replays_at_once_leave_the_class_as_it_was() -> None:
    model = tiny("llama")
    kind = type(model.model.layers[0])
    before, outputs = kind.forward, record(model)
    first, second = replayed(outputs), replayed(outputs)
    first.__enter__()
    second.__enter__()
    second.__exit__(None, None, None)
    assert kind.forward is not before
    first.__exit__(None, None, None)
    assert kind.forward is before


def test_a_copy_made_meanwhile_computes() -> None:
    model = build("llama")
    outputs, expected = record(model), logits(model, 0.7, OTHERS)
    with replayed(outputs):
        copied = copy.deepcopy(model)
        assert torch.equal(logits(copied, 0.7, OTHERS), expected)
    assert torch.equal(logits(copied, 0.7, OTHERS), expected)


@pytest.mark.parametrize(
    ("site", "count"), [("embeddings", 0), ("layers.0", 0), ("layers.1", 1), ("layers.2.mlp:input", 2)]
)
def test_which_layers_come_before(site: str, count: int) -> None:
    model = tiny("llama")
    assert layers_before(model, resolve_site(model, site)) == list(model.model.layers)[:count]
    assert layers_before(model, Site("lm_head")) == []
