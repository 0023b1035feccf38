"""Layers before a site: what they gave for some tokens, given again instead of computed again.

Whoever edits one site many times over, with the same tokens, would run the layers before it each time for nothing.
Here these layers are recorded once, and return what they returned then. That is right where layers hand on nothing but
what they return. A model may do more (later layers that share keys of earlier ones, say), so whoever records compares
a replay with the whole pass, and does without where they differ.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_msae.process_wide import SharedSetting, eager
from hf_msae.sites.hooks import in_this_thread
from hf_msae.sites.names import Site, resolve_site

# What each layer returned; empty while nothing is recorded.
Outputs = Mapping[nn.Module, Any]
_REPLAYED: ContextVar[Outputs] = ContextVar("hf_msae_replayed", default=MappingProxyType({}))
# One for each class of layers, which holds what their forward is for all of them.
_CLASSES: dict[type[nn.Module], SharedSetting] = {}
_LOCK = threading.Lock()


def layers_before(model: PreTrainedModel, site: Site) -> list[nn.Module]:
    """The layers of a stack that come before the one with a site; none where it is in no stack.

    Args:
        model: The language model.
        site: A site of it.
    """
    module: nn.Module = model
    for name in resolve_site(model, site).path.split("."):
        if isinstance(module, nn.ModuleList):
            return list(module)[: int(name)]
        module = module.get_submodule(name)
    return []


@contextmanager
def recorded(layers: list[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """While the context is open, note what layers return in this thread.

    Args:
        layers: As `layers_before` gives them.

    Yields:
        What they returned last, filled as the model runs.
    """
    found: dict[nn.Module, Any] = {}
    is_mine = in_this_thread()

    def note(layer: nn.Module, _: Any, output: Any) -> None:
        if is_mine():
            found[layer] = output

    with ExitStack() as stack:
        stack.enter_context(eager())
        for layer in layers:
            stack.callback(layer.register_forward_hook(note).remove)
        yield found


@contextmanager
def replayed(outputs: Outputs) -> Iterator[None]:
    """While the context is open, this thread's forwards take from layers what was recorded of them.

    Args:
        outputs: From `recorded`, for the same tokens; empty for an ordinary forward.
    """
    with ExitStack() as stack:
        for kind in {type(layer) for layer in outputs}:
            stack.enter_context(_passed_over(kind)())
        before = _REPLAYED.set(outputs)
        stack.callback(_REPLAYED.reset, before)
        yield


def _passed_over(kind: type[nn.Module]) -> SharedSetting:
    with _LOCK:
        return _CLASSES.setdefault(kind, SharedSetting(lambda: _looked_up_first(kind)))


@contextmanager
def _looked_up_first(kind: type[nn.Module]) -> Iterator[None]:
    """Have layers of a class look for what was recorded of them before they compute.

    The class is changed and not a layer, so that a copy of the model that is made meanwhile is as it should be.
    """
    own, computed = vars(kind).get("forward"), kind.forward

    @wraps(computed)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outputs = _REPLAYED.get()
        return outputs[self] if self in outputs else computed(self, *args, **kwargs)

    with eager():
        kind.forward = forward
        try:
            yield
        finally:
            if own is None:
                del kind.forward
            else:
                kind.forward = own
