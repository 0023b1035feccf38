"""Steering as a context: edits act on every forward of the model that runs inside it, in the thread that opened it.

Hooks are on the model, which all users of a server share. So a hook edits only where the context variable `_OPEN` says
that the code now running is inside its own `with`; for everyone else it hands the activation on untouched. Threads and
asyncio tasks each have their own value of a context variable, so many may steer one model at once, each differently.

The price: a thread started inside the context is outside of it. Open the context in the thread that generates
(`SteeredPipeline` does), not around `Thread(target=model.generate)`, and not around a `yield`.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from hf_msae.modeling import MatryoshkaSAE
from hf_msae.outliers import within_limit
from hf_msae.sites import (
    Site,
    check_width,
    recorded_output_site,
    recorded_site,
    replace,
    resolve_site,
)
from hf_msae.steering.directions import Direction
from hf_msae.steering.edits import Delta, Edit, Units, check_edits, check_sae_names, deltas, latent_edits
from hf_msae.steering.gates import Gate, Gates, SteeringError
from hf_msae.steering.generation import watched
from hf_msae.steering.positions import Positions, TokenTracker, check_positions, find_special_ids

# What is added to activations (batch, time, hidden_size) of a forward that a tracker watches.
DeltaFunction = Callable[[Tensor, TokenTracker], Tensor]
# The steerings that the running code is inside of.
_OPEN: ContextVar[tuple[TokenTracker, ...]] = ContextVar("hf_msae_steering", default=())


class _Kept(threading.local):
    """What transcoders read in this thread, by site."""

    def __init__(self) -> None:
        self.hidden: dict[Site, Tensor] = {}


@contextmanager
def steer(
    model: PreTrainedModel,
    sae: MatryoshkaSAE,
    latents: Mapping[int, float] | Sequence[int] | None = None,
    *,
    method: str = "add",
    units: Units = "max",
    level: int | None = None,
    keep_error: bool = True,
    positions: Positions = "all",
    special_ids: Iterable[int] | None = None,
    when: Gate | Sequence[Gate] = (),
) -> Iterator[None]:
    """Steer a model at the SAE's site while the context is open, in `forward` and in `generate`.

    Args:
        model: the language model.
        sae: the SAE, in evaluation mode; its configuration says where it reads.
        latents: the value of each latent; for "ablate", a list of latents will do.
        method: "add", "clamp", "ablate" or "scale" latents, or "prefix": keep only a level.
        units: of the values: "max" (the latent's largest activation in training; try 0.5 first, then 1, 2, 4),
            "absolute" (the latent's activation) or "norm" (a shift as long as the token's activation).
        level: with "prefix", an index into `config.prefix_sizes`.
        keep_error: with "prefix", whether what the SAE does not explain stays.
        positions: "all" tokens, those of the "prompt" or "generated" ones; a slice of each row's prompt without its
            padding; or a bool mask of the prompt, (tokens,) or (batch, tokens).
        special_ids: tokens that are never steered; by default the model's BOS, EOS and padding. Padding never is, nor
            are outliers, beyond the SAE's `norm_limit`.
        when: a gate, or several that must all be open: only there do the latents' edits act.

    What changes nothing (strength 0, scale 1, clamping to the latent's own value) leaves all outputs equal to the bit.
    Contexts nest, for several SAEs and sites: at one site the one entered last is applied first. They act in the
    thread that opened them and nowhere else.

    Raises SteeringError, a ValueError, on entering, for anything of the above that the SAE or the model does not have.
    """
    edits = latent_edits(latents, method, units, level, keep_error, when)
    with steering_context(model, {"": sae}, edits, positions=positions, special_ids=special_ids):
        yield


@contextmanager
def steering_context(
    model: PreTrainedModel,
    saes: Mapping[str, MatryoshkaSAE],
    edits: Sequence[Edit],
    *,
    positions: Positions = "all",
    special_ids: Iterable[int] | None = None,
) -> Iterator[None]:
    """`steer` for edits of several SAEs at once, each found under the name that the edit gives as `sae`.

    At one site, all edits see the activation before any of them, and what they add is summed. A transcoder's latents
    are read at its `site`, as the model has it there, and act at its `site_out`.
    """
    check_sae_names(edits, saes)
    by_site: dict[Site, list[DeltaFunction]] = {}
    read: set[Site] = set()
    kept = _Kept()  # what transcoders read in a thread's forward, by site
    follows_texts = False
    for name, sae in saes.items():
        of_sae = [edit for edit in edits if edit.sae == name]
        check_edits(sae, of_sae, name)
        if of_sae:
            site = resolve_site(model, recorded_site(sae.config, called=name, error=SteeringError))
            acts_at = resolve_site(model, recorded_output_site(sae.config, called=name, error=SteeringError))
            source = (site, kept) if acts_at != site else None
            for delta in deltas(sae, of_sae):
                by_site.setdefault(acts_at, []).append(_on_device_of(sae, delta, model, acts_at, name, source))
                follows_texts |= delta.gates is not None and delta.gates.any_later
                if source is not None:
                    read.add(site)
    with _steered(model, by_site, positions, special_ids, follows_texts, dict.fromkeys(read, kept)):
        yield


@contextmanager
def steer_direction(
    model: PreTrainedModel,
    direction: Direction,
    strength: float,
    *,
    units: Units = "absolute",
    positions: Positions = "all",
    special_ids: Iterable[int] | None = None,
    norm_limit: float | None = None,
) -> Iterator[None]:
    """Add `strength` times a direction, in units of length ("absolute") or of the token's own length ("norm").

    Activations beyond `norm_limit` are outliers and left alone, as an SAE leaves those beyond its own; None for none.
    """
    if units not in ("absolute", "norm"):
        raise SteeringError(f"a direction has no latent, so units must be 'absolute' or 'norm', got {units!r}.")

    vector = direction.vector

    def delta(x: Tensor, tracker: TokenTracker) -> Tensor:
        nonlocal vector
        if (vector.device, vector.dtype) != (x.device, x.dtype):
            vector = direction.vector.to(x.device, x.dtype)  # kept, so that no later token waits for it
        shift = strength * vector
        shifts = shift * x.norm(dim=-1, keepdim=True) if units == "norm" else shift.expand_as(x)
        return torch.where(within_limit(x, norm_limit).unsqueeze(-1), shifts, 0) if norm_limit else shifts

    site = resolve_site(model, direction.site)
    with _steered(model, {site: [delta] if strength else []}, positions, special_ids):
        yield


@contextmanager
def _steered(
    model: PreTrainedModel,
    by_site: Mapping[Site, Sequence[DeltaFunction]],
    positions: Positions,
    special_ids: Iterable[int] | None,
    follows_texts: bool = False,
    read: Mapping[Site, _Kept] = MappingProxyType({}),
) -> Iterator[None]:
    check_positions(positions)
    outermost = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if outermost is None:
        raise SteeringError(f"a {type(model).__name__} holds no model of transformers, and only those are steered.")
    if outermost.config.is_encoder_decoder:
        raise SteeringError(
            f"{type(outermost).__name__} has an encoder and a decoder, each with tokens of its own; steering "
            "takes models with one sequence of tokens."
        )
    tracker = TokenTracker(positions, find_special_ids(outermost, special_ids), follows_texts)
    edits = {site: _edit(tracker, functions) for site, functions in by_site.items() if functions}
    if not edits:
        yield
        return
    edits |= {site: _reading(site, kept, edits.get(site)) for site, kept in read.items()}

    def is_active() -> bool:
        return tracker in _OPEN.get()

    # While another thread enters or leaves its own steering, torch may call a hook without `kwargs`: it marks a hook
    # as taking them only after it is on the module.
    def on_call(
        module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, is_outermost: bool
    ) -> None:
        if kwargs is not None and is_active():
            tracker.on_call(module, args, kwargs, is_outermost)

    with ExitStack() as stack:
        # First of all: it sees to it that nothing compiled runs while there are hooks.
        stack.enter_context(replace(model, edits, is_active))
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                hook = partial(on_call, is_outermost=module is outermost)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if isinstance(module, GenerationMixin):
                stack.enter_context(watched(module, tracker.on_generate, is_active))
        _OPEN.set((*_OPEN.get(), tracker))
        # Not by a token: what opened in one context may close in another, as generators do.
        stack.callback(lambda: _OPEN.set(tuple(other for other in _OPEN.get() if other is not tracker)))
        yield


def _edit(tracker: TokenTracker, functions: Sequence[DeltaFunction]) -> Callable[[Tensor], Tensor]:
    return lambda hidden: _edited(hidden, functions, tracker)


def _reading(site: Site, kept: _Kept, edit: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    """Keep what transcoders read at a site, before it is edited there, for where they act."""

    def keep(hidden: Tensor) -> Tensor:
        # What runs next may add into it in place.
        kept.hidden[site] = hidden.clone()
        return hidden if edit is None else edit(hidden)

    return keep


def _edited(hidden: Tensor, functions: Sequence[DeltaFunction], tracker: TokenTracker) -> Tensor:
    """The activation (batch, time, hidden_size) with what the functions add where the tracker says so.

    Sums are made in the wider of the two precisions, so a token to which zeros are added keeps its value exactly.
    """
    steered = tracker.steered(hidden)
    each = [function(hidden, tracker) for function in functions]
    added = torch.stack(each).sum(0) if len(each) > 1 else each[0]
    wider = torch.promote_types(hidden.dtype, added.dtype)
    new = (hidden.to(wider) + added.to(wider)).to(hidden.dtype)
    return torch.where(steered.unsqueeze(-1), new, hidden)


def _on_device_of(
    sae: MatryoshkaSAE,
    delta: Delta,
    model: PreTrainedModel,
    site: Site,
    name: str,
    source: tuple[Site, _Kept] | None,
) -> DeltaFunction:
    """The function on the SAE's device and in its precision, for activations of any.

    It is 0 where gates are closed, and for outliers, such as attention sinks, of which the SAE has learnt nothing.
    `site` is where it acts; `source`, of a transcoder, where it reads, and where what was read there is kept.
    """

    def moved(hidden: Tensor, tracker: TokenTracker) -> Tensor:
        h = hidden.flatten(0, 1)
        if source is None:
            check_width(hidden.shape[-1], sae.config, site, model, called=name, error=SteeringError)
            x = h
        else:
            check_width(hidden.shape[-1], sae.config, site, model, called=name, error=SteeringError, output=True)
            x = _read_of(sae, model, source, site, name).flatten(0, 1).to(h.device)
        own = x.to(sae.device, sae.W_dec.dtype)
        there = own if source is None else h.to(own)
        acts = within_limit(x, sae.config.norm_limit)
        if source is not None:
            acts = acts & within_limit(h, sae.config.norm_limit_out)
        if delta.gates is not None:
            fired = (delta.gates.fired(own).to(x.device) & acts.unsqueeze(-1)).view(*hidden.shape[:2], -1)
            acts = acts & _open(delta.gates, fired, tracker).flatten()
        added = torch.where(acts.unsqueeze(-1), delta.vector(own, there).to(x.device), 0)
        return added.view(*hidden.shape[:2], -1)

    return moved


def _read_of(sae: MatryoshkaSAE, model: PreTrainedModel, source: tuple[Site, _Kept], site: Site, name: str) -> Tensor:
    read, kept = source
    hidden = kept.hidden.get(read)
    if hidden is None:
        raise SteeringError(
            f"the transcoder {name or 'that steers'} reads {read}, which {type(model).__name__} does not run before "
            f"{site}, where it writes; steer with one that reads an earlier place."
        )
    check_width(hidden.shape[-1], sae.config, read, model, called=name, error=SteeringError)
    return hidden


def _open(gates: Gates, fired: Tensor, tracker: TokenTracker) -> Tensor:
    """On which tokens (batch, time) all gates are open, whose latents `fired` (batch, time, gates)."""
    if gates.any_later:
        fired = torch.where(gates.later.to(fired.device), tracker.seen_before(gates, fired), fired)
    return fired.all(-1)
