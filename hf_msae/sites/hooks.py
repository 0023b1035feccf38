"""Captures activations at sites, and replaces them.

Everything is done with forward hooks on the model as it stands: its weights, devices and dtypes are never touched, so
a quantised model or one split by `device_map` works like any other. Three habits of transformers are evened out here
and nowhere else: layers return a tensor in most architectures and a tuple that begins with it in others; the
activation comes as a positional argument or as `hidden_states=`; and a few architectures (OPT, Llama 4's experts)
flatten batch and sequence inside a layer. Callers always see (batch, sequence, hidden), of the tokens that the model
was called with; a module with any other layout is refused (`layouts` says how it is told).
"""

import contextvars
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_msae.devices import device_of
from hf_msae.process_wide import eager
from hf_msae.sites.layouts import Layout, misplacement, probe_tokens, token_shapes
from hf_msae.sites.names import Site, SiteError, resolve_site

# The ends of modules whose layout has been found to be right.
_PROBED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
_PROBING = contextvars.ContextVar("hf_msae_probing", default=False)


def site_width(model: PreTrainedModel, site: Site) -> int:
    """The size of the last dimension at a site, measured by forwards over a few tokens that stop at the site.

    Raises SiteError as `capture` does.
    """
    if model.main_input_name != "input_ids":
        raise SiteError(
            f"{type(model).__name__} reads {model.main_input_name} rather than the token ids of a text (input_ids), "
            "so it has no activations of tokens; give a language model"
        )
    with _same_dropout(model):
        return capture(model, [site], **_probe_inputs(model, 0)[0])[site].shape[-1]


def check_order(model: PreTrainedModel, first: Site, then: Site) -> None:
    """Make sure that a forward comes to one site before it comes to another, with the same tokens at both.

    first, then: as `resolve_site` returns them.

    Raises SiteError where it does not, or as `capture` does.
    """
    passed: list[Site] = []
    shapes: dict[Site, tuple[int, ...]] = {}

    def note(site: Site, hidden: Tensor) -> None:
        passed.append(site)
        shapes.setdefault(site, tuple(hidden.shape[:2]))
        if len(shapes) == 2:
            raise _AllCapturedError

    check_layout(model, [first, then])
    visits = {site: lambda hidden, site=site: note(site, hidden) for site in (first, then)}
    hooked = _hooked(model, visits, prepend=False, is_active=in_this_thread())
    with _same_dropout(model), hooked, torch.no_grad(), suppress(_AllCapturedError):
        model(**_probe_inputs(model, 0)[0])
    missed = [str(site) for site in (first, then) if site not in shapes]
    if missed:
        raise SiteError(f"the forward of {type(model).__name__} did not run {', '.join(missed)}; name other modules")
    if passed[0] != first:
        raise SiteError(
            f"{then} runs before {first}, and a transcoder may not look back: it would reconstruct what its input is "
            "made of. Read the earlier place (site) and write the later one (site_out)"
        )
    if shapes[first] != shapes[then]:
        raise SiteError(
            f"{first} has vectors for (batch, sequence) = {shapes[first]}, and {then} for {shapes[then]}: a "
            "transcoder needs two places with the same tokens, so both in the encoder, or both in the decoder"
        )


def check_layout(model: PreTrainedModel, sites: Sequence[Site]) -> None:
    """Make sure that sites hold the vectors of the model's tokens, in their order; `capture` and `replace` do it.

    A site that is asked about for the first time costs three forwards of two rows with four tokens, which stop there;
    the answer is kept with the module. What they cannot find: vectors in another order within a row, where the last
    token's is in its place or where all of a row's tokens attend to each other. A model that reads images or sounds
    instead of tokens is not looked at.

    Raises SiteError as `capture` does, and where a change of some tokens shows that vectors belong to others.
    """
    ends = {
        site: _PROBED.setdefault(model.get_submodule(resolve_site(model, _site(site)).path), set()) for site in sites
    }
    new = [site for site in ends if site.io not in ends[site]]
    if new and model.main_input_name == "input_ids":
        # A context of its own, outside of all edits that are made in this one.
        contextvars.Context().run(_probe, model, new)
        for site in new:
            ends[site].add(site.io)


def _probe(model: PreTrainedModel, sites: Sequence[Site]) -> None:
    _PROBING.set(True)
    wrong = _misplacements(model, sites, draw=0)
    if wrong:
        # Rounding may tip a router that cannot decide between two experts; it does not do so twice.
        again = [_misplacements(model, list(wrong), draw) for draw in (1, 2)]
        wrong = {site: what for site, what in wrong.items() if any(site in found for found in again)}
    for site, what in wrong.items():
        raise SiteError(
            f"the {site.io} of {site.path} does not hold its vectors in the order of the tokens, as (batch, sequence, "
            f"hidden): {what}. It may keep the sequence before the batch, or deal tokens out to experts: name another "
            "module, or the other end of this one"
        )


def _misplacements(model: PreTrainedModel, sites: Sequence[Site], draw: int) -> dict[Site, str]:
    """What is wrong at those of the sites where something is."""
    found = []
    for inputs in _probe_inputs(model, draw):
        with _same_dropout(model):
            found.append(_capture(model, sites, **inputs))
    wrong = {site: misplacement(*(hidden[site] for hidden in found)) for site in sites}
    return {site: what for site, what in wrong.items() if what is not None}


@contextmanager
def _same_dropout(model: PreTrainedModel) -> Iterator[None]:
    """In training mode, dropout drops the same numbers each time, and leaves the generators as they were."""
    if not model.training:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _probe_inputs(model: PreTrainedModel, draw: int) -> list[dict[str, Tensor]]:
    device = device_of(model)
    vocab_size = model.config.get_text_config().vocab_size
    inputs = [{"input_ids": tokens} for tokens in probe_tokens(vocab_size, 4, device, draw)]
    if model.config.is_encoder_decoder:
        # Of another length, so that what the decoder reads of the encoder's tokens is not taken for its own.
        for given, tokens in zip(inputs, probe_tokens(vocab_size, 5, device, draw), strict=True):
            given["decoder_input_ids"] = tokens
    return inputs


def capture(model: PreTrainedModel, sites: Sequence[Site], **inputs: Any) -> dict[Site, Tensor]:
    """The activations at some sites, from one forward that stops as soon as it has passed them all.

    sites: as `resolve_site` returns them; one or more, in any order.
    inputs: what the model's forward takes (`input_ids`, `attention_mask`, ...). `use_cache` is off unless given.

    Returns, for each site, a tensor (batch, sequence, hidden) in the dtype and on the device where it arose, with
    batch and sequence those of the tokens in `inputs`. It has no gradient history, and unlike an inference tensor it
    can enter one. A module that runs several times in one forward is captured at its first run. Dropout follows the
    model's mode: call `model.eval()` first.

    The model is called as it was passed, so that the hooks of accelerate move the inputs as usual; the head still
    never runs, because the forward stops before it. A compiled model runs uncompiled. The hooks are removed whatever
    happens, and look at this thread's forward only.

    Raises SiteError for a site that the model does not have, that the forward does not run, or that holds something
    other than the tokens' vectors in their order (see `check_layout`, which runs before the first capture at a site).
    """
    if not sites:
        raise SiteError("capture was given no sites; expected at least one, as resolve_site returns them")
    check_layout(model, sites)
    captured = _capture(model, sites, **inputs)
    given = token_shapes(inputs)
    for site, hidden in captured.items():
        if given and hidden.shape[:2] not in given:
            raise SiteError(
                f"the {site.io} of {site.path} has vectors for (batch, sequence) = {tuple(hidden.shape[:2])}, and the "
                f"inputs have tokens for {tuple(given[0])}; tokens that an adapter puts before a prompt have no place "
                "here: capture in the model without it"
            )
    return captured


def _capture(model: PreTrainedModel, sites: Sequence[Site], **inputs: Any) -> dict[Site, Tensor]:
    wanted = set(sites)
    captured: dict[Site, Tensor] = {}

    def keep(site: Site, hidden: Tensor) -> None:
        if site in captured:
            return
        # What runs next may add into this tensor in place (Falcon does), so it is copied where the forward goes on.
        # Behind the last site nothing runs, and the usual case of a single site costs no copy.
        is_last = len(captured) == len(wanted) - 1
        captured[site] = hidden.detach() if is_last else hidden.detach().clone()
        if is_last:
            raise _AllCapturedError

    visits = {site: lambda hidden, site=site: keep(site, hidden) for site in wanted}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs = {"use_cache": False, **inputs}
    hooked = _hooked(model, visits, prepend=False, is_active=in_this_thread())
    with hooked, torch.no_grad(), suppress(_AllCapturedError):
        model(**inputs)
    missed = sorted(str(site) for site in wanted - captured.keys())
    if missed:
        raise SiteError(
            f"the forward of {type(model).__name__} did not run {', '.join(missed)}; name a module that these inputs "
            "pass through (a container such as a ModuleList is never run itself)"
        )
    return {site: captured[site] for site in sites}


def in_this_thread() -> Callable[[], bool]:
    """Asks whether the code now running is in the thread that called this."""
    here = threading.get_ident()
    return lambda: threading.get_ident() == here


def _always() -> bool:
    return True


@contextmanager
def replace(
    model: PreTrainedModel,
    edits: Mapping[Site, Callable[[Tensor], Tensor]],
    is_active: Callable[[], bool] = _always,
) -> Iterator[None]:
    """While the context is open, every forward of the model goes on from `fn(activation)` at each site.

    edits: for each site, a function from the activation (batch, sequence, hidden) to one of the same shape, dtype and
        device. It must not change its argument in place, because the residual stream may share that memory. Where it
        returns its argument itself, the model's outputs are those without the edit, bit for bit.
    is_active: asked at each site in each forward; where it says no, the forward is left alone.

    In `generate` with a cache, `fn` first sees the whole prompt and then one token at a time, each token once.
    Contexts nest; at one site the edit entered last is applied first. `capture` and `output_hidden_states` see all
    edits. A compiled model runs uncompiled, since what was compiled before knows nothing of the edits. The hooks are
    removed on leaving, whatever happened. They are on the model, not on the thread: whoever runs the same model
    meanwhile is edited as well, unless `is_active` knows whose forward it is (`in_this_thread()`, or as in
    `steering`). With gradient checkpointing the backward pass runs the layers again, and belongs inside the context.

    Raises SiteError on entering, for a site that the model does not have; and in the forward, where `fn` returns
    another shape, dtype or device, or where the site holds something other than (batch, sequence, hidden).
    """
    visits = {site: lambda hidden, site=site, fn=fn: _checked(site, hidden, fn(hidden)) for site, fn in edits.items()}
    check_layout(model, list(edits))

    def is_edited() -> bool:
        return not _PROBING.get() and is_active()

    # Before other hooks: those with which transformers records `output_hidden_states` stay on the model from their
    # first use, and would otherwise record the activation without the edit, or with it, depending on what ran before.
    with _hooked(model, visits, prepend=True, is_active=is_edited):
        yield


class _AllCapturedError(Exception):
    """Raised from the hook of the last site captured, to leave the forward there; never leaves this module."""


@dataclass
class _Tap:
    """Stands at a site while a forward runs, and shows the activation to `visit` as (batch, sequence, hidden).

    What `visit` returns takes the activation's place; where it returns None, nothing is touched. Where `is_active`
    says no, the forward is somebody else's and is not even looked at. What is known of a forward is kept per thread.
    """

    site: Site
    visit: Callable[[Tensor], Tensor | None]
    is_active: Callable[[], bool]
    layout: Layout = field(default_factory=Layout)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Tap":
        return self

    # Torch marks a hook as taking `kwargs` only once it is on the module, and unmarks it only when it is off. So
    # another thread's forward may call it without them; it is never active there.
    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is not None and self.is_active():
            self.layout.enter(module, args, kwargs)

    def on_return(self, module: nn.Module, *_: Any) -> None:
        self.layout.leave(module)

    def on_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is not None and self.is_active():
            self.layout.enter_layer(args[0] if args else kwargs.get("hidden_states"))

    def on_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs is None:
            return None
        new = self._show(args[0] if args else kwargs.get("hidden_states"))
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = self._show(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def _show(self, value: Any) -> Tensor | None:
        if not self.is_active():
            return None
        hidden = self.layout.per_token(value)
        if hidden is None:
            given = (
                f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            )
            raise SiteError(
                f"the {self.site.io} of {self.site.path} is {given}{self.layout.describe()}; expected one "
                "floating-point vector for each token, (batch, sequence, hidden): name another module, or the other "
                "end of this one"
            )
        new = self.visit(hidden)
        return None if new is None else new.reshape(value.shape)


@contextmanager
def _hooked(
    model: PreTrainedModel,
    visits: Mapping[Site, Callable[[Tensor], Tensor | None]],
    prepend: bool,
    is_active: Callable[[], bool],
) -> Iterator[None]:
    # A copy of the model made meanwhile takes its hooks along, so they end with the context, not with their removal.
    is_open = [True]

    def acts() -> bool:
        return bool(is_open) and is_active()

    with ExitStack() as stack:
        stack.callback(is_open.clear)
        # Before any hook is there, and until none is: no thread may compile a model with the hooks in it.
        stack.enter_context(eager())
        for site, visit in visits.items():
            path = resolve_site(model, _site(site)).path
            module, layer, tap = model.get_submodule(path), _layer_around(model, path), _Tap(site, visit, acts)
            for caller in _models_around(model, path):
                handle = caller.register_forward_pre_hook(tap.on_call, with_kwargs=True)
                stack.callback(handle.remove)
                # Whatever happens in the call, it is over.
                handle = caller.register_forward_hook(tap.on_return, always_call=True)
                stack.callback(handle.remove)
            if layer is not None and layer is not module:
                handle = layer.register_forward_pre_hook(tap.on_layer, with_kwargs=True)
                stack.callback(handle.remove)
            if site.io == "input":
                handle = module.register_forward_pre_hook(tap.on_input, prepend=prepend, with_kwargs=True)
            else:
                handle = module.register_forward_hook(tap.on_output, prepend=prepend)
            stack.callback(handle.remove)
        yield


def _site(site: Any) -> Site:
    if not isinstance(site, Site):
        raise SiteError(f"expected a Site, given {site!r}; make one with resolve_site(model, {site!r})")
    return site


def _checked(site: Site, old: Tensor, new: Any) -> Tensor:
    expected = (tuple(old.shape), old.dtype, old.device)
    given = (tuple(new.shape), new.dtype, new.device) if isinstance(new, Tensor) else type(new).__name__
    if given != expected:
        raise SiteError(
            f"the function for {site} returned {given}; expected a tensor of the same (shape, dtype, device) as the "
            f"activation it was given, {expected}"
        )
    return new


def _models_around(model: PreTrainedModel, path: str) -> list[nn.Module]:
    """The model, and the models inside it that hold the module: each may be called with tokens."""
    names = path.split(".")
    inside = [model.get_submodule(".".join(names[:depth])) for depth in range(1, len(names))]
    return [model, *(module for module in inside if isinstance(module, PreTrainedModel))]


def _layer_around(model: nn.Module, path: str) -> nn.Module | None:
    module = model
    for name in path.split("."):
        parent, module = module, module.get_submodule(name)
        if isinstance(parent, nn.ModuleList):
            return module
    return None
