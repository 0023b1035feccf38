"""What `generate` was asked: while steerings watch a model, its `generate` tells them which prompt it was given.

A forward cannot tell a prompt from what follows it: prompts come whole, in chunks (`prefill_chunk_size`), together
with guesses of what follows (prompt lookup, assistant models) or behind a cache that was filled beforehand. So the
prompt is read from the call of `generate` itself, which an object in its place on the model sees and hands on.
"""

import copy
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from hf_msae.steering.gates import SteeringError

_LOCK = threading.Lock()
# These run the model in a thread of their own, which no steering is open in.
_ELSEWHERE = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")

Call = Callable[..., AbstractContextManager[None]]


@dataclass
class Request:
    """One call of `generate`.

    real: which tokens of the prompt are no padding, (batch, width).
    num_cached: how many of them were in the cache that came with it; None where the cache does not say.
    input_ids: the tokens, where they were given, (batch, width or less).
    has_embeds: whether embeddings were given, which then stand for the tokens.
    num_beams: how many texts compete, whose rows change places while they are written.
    """

    real: Tensor
    num_cached: int | None
    input_ids: Tensor | None
    has_embeds: bool
    num_beams: int = 1

    @property
    def width(self) -> int:
        """Tokens of the prompt, padding included."""
        return self.real.shape[1]

    def real_of(self, num_rows: int) -> Tensor:
        """`real` for as many rows as `generate` makes of the batch, for beams and for several answers."""
        if num_rows % len(self.real):
            raise SteeringError(f"generate was given {len(self.real)} prompts and runs {num_rows} texts.")
        return self.real.repeat_interleave(num_rows // len(self.real), dim=0)

    def goes_on_from(self, other: "Request") -> bool:
        """Whether the tokens begin with those of another request, as drafts by the first layers of a model do."""
        ids, before = self.input_ids, other.input_ids
        if ids is None or before is None or len(ids) != len(before) or ids.shape[1] < before.shape[1]:
            return False
        return torch.equal(ids[:, : before.shape[1]], before)


def read_request(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Request:
    """What `generate(*args, **kwargs)` is asked, by the same rules by which it reads its arguments."""
    given = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
    ids: Any = given.get("input_ids") if given.get("inputs") is None else given["inputs"]
    tokens: Any = ids if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if tokens is None:  # then it begins with BOS
        batch = next((len(value) for value in kwargs.values() if isinstance(value, Tensor)), 1)
        tokens = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    cache, width, mask = given.get("past_key_values"), tokens.shape[1], given.get("attention_mask")
    num_cached = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
    # Behind a filled cache the tokens are the whole sequence, or only the new ones with a mask for the whole.
    if num_cached and mask is not None and tokens is ids and mask.shape[1] != width:
        width += num_cached
    real = torch.ones(len(tokens), width, dtype=torch.bool, device=tokens.device)
    if mask is None and tokens is ids and width == tokens.shape[1]:
        mask = _mask_of_padding(model, tokens, given)
    if mask is not None:
        shared = min(width, mask.shape[1])
        real[:, width - shared :] = mask[:, mask.shape[1] - shared :].to(real.device) != 0
    says = given.get("cache_params") is None  # a state-space model's cache counts no tokens
    has_embeds = given.get("inputs_embeds") is not None
    return Request(real, num_cached if says else None, ids, has_embeds, _num_beams(model, given))


def _num_beams(model: Any, given: Mapping[str, Any]) -> int:
    configs = (given.get("generation_config"), model.generation_config)
    values = [given.get("num_beams"), *(config.num_beams for config in configs if config is not None)]
    return next((value for value in values if value is not None), 1)


def _mask_of_padding(model: Any, ids: Tensor, given: Mapping[str, Any]) -> Tensor | None:
    """As `generate` does without a mask: the padding token is padding, unless it also ends texts."""
    config = given.get("generation_config") or model.generation_config
    pad, eos = config.pad_token_id, config.eos_token_id
    pad = given.get("pad_token_id", model.generation_config.pad_token_id if pad is None else pad)
    eos = given.get("eos_token_id", model.generation_config.eos_token_id if eos is None else eos)
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    return None if pad is None or pad in ends else ids != pad


class _Observed:
    """In the place of a model's `generate`, while anybody watches; it opens their contexts around the call."""

    def __init__(self, original: Callable[..., Any], is_own: bool) -> None:
        self.original, self.is_own = original, is_own
        self.watchers: list[Call] = []
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for watch in tuple(self.watchers):
                stack.enter_context(watch(args, kwargs))
            return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """A copy of the model has a `generate` of its own, which nobody watches."""
        return copy.deepcopy(self.original, memo)


@contextmanager
def observed(model: Any, name: str, watch: Call) -> Iterator[None]:
    """While the context is open, `watch(args, kwargs)` is a context around every call of a method of the model.

    Whoever enters and leaves in whatever order, the method is as it was when the last one has left.
    """
    with _LOCK:
        there: Any = vars(model).get(name)
        if not isinstance(there, _Observed):
            there = _Observed(getattr(model, name), is_own=name in vars(model))
            setattr(model, name, there)
        there.watchers.append(watch)
    try:
        yield
    finally:
        with _LOCK:
            there.watchers.remove(watch)
            if not there.watchers and vars(model).get(name) is there:
                delattr(model, name)
                if there.is_own:
                    setattr(model, name, there.original)


@contextmanager
def watched(model: Any, on_generate: Call, is_active: Callable[[], bool]) -> Iterator[None]:
    """Observe the `generate` of a model, and refuse generation in other threads, for whom `is_active`."""

    @contextmanager
    def ask(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
        if not is_active():
            yield
            return
        with on_generate(read_request(model, args, kwargs)):
            yield

    @contextmanager
    def refuse(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
        if is_active():
            raise SteeringError(
                "continuous batching runs the model in a thread of its own, where it is not steered; call generate "
                "with a batch of prompts instead."
            )
        yield

    with ExitStack() as stack:
        stack.enter_context(observed(model, "generate", ask))
        for name in _ELSEWHERE:
            stack.enter_context(observed(model, name, refuse))
        yield
