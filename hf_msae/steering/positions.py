"""Which tokens are steered: found anew for every forward of the model, from what it was called with.

Padding and special tokens (BOS above all, whose activations are outliers in most models) never are. In `generate`, the
prompt is what it was given (see `generation`). In a forward outside of it, the prompt is what stands in an empty cache
or in none, and single tokens behind it are generated. Where neither tells, "all" tokens can be steered, and anything
else is refused.
"""

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from hf_msae.modeling.devices import sent
from hf_msae.sites.layouts import call_arguments
from hf_msae.steering.gates import SteeringError
from hf_msae.steering.generation import Request

Positions = Literal["all", "prompt", "generated"] | slice | Tensor
NAMES = ("all", "prompt", "generated")
SPECIAL_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class _Call:
    """One forward.

    Args:
        input_ids: its tokens (batch, time), if it got tokens.
        shape: (batch, time).
        device: where they are.
        real: which are no padding, bool (batch, time); None where its mask does not say.
        past: how many are in the cache.
        cache: None where none was passed.
    """

    input_ids: Tensor | None
    shape: torch.Size
    device: torch.device
    real: Tensor | None
    past: int
    cache: Any

    @property
    def num_columns(self) -> int:
        """How many tokens the sequence has by now, padding included."""
        return self.past + self.shape[1]


@dataclass
class _Text:
    """A prompt and what follows it, as the forwards so far tell.

    first: the column of the prompt's first token; virtual tokens that were put into the cache stand before it.
    width: of the prompt. chosen: which of its tokens a slice or a mask means, (batch, width).
    input_ids: the prompt, where it is known and no cache is used. cache: a weak reference to the one that is.
    end: the number of columns after the last forward. happened: what `seen_before` was told, (batch, columns, m).
    """

    first: int
    width: int
    chosen: Tensor | None
    input_ids: Tensor | None
    cache: weakref.ref[Any] | None
    end: int
    happened: dict[object, Tensor] = field(default_factory=dict)

    def goes_on(self, call: _Call) -> bool:
        """Whether a forward is about this text. The cache that a model made in the first one is known from then on."""
        if call.cache is None:
            ids, before = call.input_ids, self.input_ids
            if self.cache is not None or ids is None or before is None or ids.shape[1] < before.shape[1]:
                return False
            return len(ids) == len(before) and torch.equal(ids[:, : before.shape[1]], before)
        if self.cache is None and call.past == self.end:
            self.cache = weakref.ref(call.cache)
        return self.cache is not None and self.cache() is call.cache


@dataclass
class _Generation:
    """A running `generate`: what it was asked, and its text as soon as the model has been called."""

    request: Request
    text: _Text | None = None


@dataclass(eq=False)
class TokenTracker:
    """Watches the calls of a model and says which tokens of the running one are steered.

    positions: "all", "prompt", "generated"; a slice of each row's prompt, counted without its padding; or a mask of
        prompt tokens (tokens,) or (batch, tokens), padding included. Slices and masks leave generated tokens alone.
    special_ids: tokens that are never steered.
    follows_texts: whether gates ask what came before a token (`seen_before`).

    What it has seen is kept per thread, as a generation runs in one.
    """

    positions: Positions
    special_ids: Tensor
    follows_texts: bool = False
    _per_thread: threading.local = field(default_factory=threading.local)
    # The special ids on each device that asked, so that a GPU gets them once and not with every token.
    _special_on: dict[torch.device, Tensor] = field(default_factory=dict)

    @contextmanager
    def on_generate(self, request: Request) -> Iterator[None]:
        """Around a call of `generate`.

        One inside another that goes on from its prompt (drafts of early layers) has the same prompt.
        """
        outer: _Generation | None = self._per_thread.__dict__.get("generation")
        if outer is not None and request.goes_on_from(outer.request):
            request = replace(outer.request, num_cached=request.num_cached)
        self._per_thread.generation = _Generation(request)
        try:
            yield
        finally:
            self._per_thread.generation = outer

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_outermost: bool) -> None:
        """Read a call of the model or of a model inside it: some heads pass over the base model, to a decoder."""
        given = call_arguments(module, args, kwargs)
        input_ids = given.get("input_ids")
        if not is_outermost and (input_ids is None or input_ids is self._per_thread.__dict__.get("input_ids")):
            return
        call = _read_call(given, num_seen=self._per_thread.__dict__.get("num_columns", 0))
        allowed = self._real_by_request(call) if call.real is None else call.real
        if input_ids is not None:
            allowed = allowed & ~self._is_special(input_ids)
        self._per_thread.allowed, self._per_thread.past = allowed, call.past
        self._per_thread.steered = allowed & self._selected(call)
        self._per_thread.num_columns, self._per_thread.input_ids = call.num_columns, input_ids

    def steered(self, hidden: Tensor) -> Tensor:
        """Which tokens of an activation (batch, time, hidden_size) are steered, (batch, time), in this forward.

        Raises SteeringError where the model was not called as a whole, or splits its tokens differently at the site.
        """
        steered = self._per_thread.__dict__.get("steered")
        if steered is None or steered.shape != hidden.shape[:2]:
            shape = None if steered is None else tuple(steered.shape)
            raise SteeringError(
                f"the site has activations for (batch, time) = {tuple(hidden.shape[:2])}, and the model was called "
                f"with {shape}; call the model itself rather than one of its modules."
            )
        return steered.to(hidden.device)

    def seen_before(self, asked_by: object, fired: Tensor) -> Tensor:
        """Whether something happened on an earlier token of the text that counts (no special token, no padding).

        Args:
            asked_by: who asks, in every forward of a text.
            fired: on which tokens of this forward it happened, (batch, time, m) for m things.

        Returns:
            Of each token whether it happened before it, (batch, time, m).

        Raises:
            SteeringError: the text began outside of the steering, so what happened in it is not known.
        """
        past, text = self._per_thread.past, self._per_thread.current
        fired = fired & self._per_thread.allowed.to(fired.device).unsqueeze(-1)
        before = text.happened.get(asked_by)
        if before is None:  # virtual tokens before the prompt count no more than special ones
            before = fired.new_zeros(len(fired), text.first, fired.shape[-1])
        if before.shape[1] < past or len(before) != len(fired):
            raise SteeringError(
                "a gate with then='after' must see a text from its first token, and the model was called behind a "
                f"cache of {past} tokens of which {before.shape[1]} were seen; begin with an empty cache inside "
                "the steering."
            )
        whole = torch.cat([before[:, :past], fired], dim=1)
        text.happened[asked_by] = whole
        return ((whole.cumsum(1) - whole.long()) > 0)[:, past:]

    def _is_special(self, input_ids: Tensor) -> Tensor:
        """Which tokens are special, bool (batch, time). `torch.isin` sorts by sizes for which it waits on a GPU."""
        device = input_ids.device
        if device not in self._special_on:
            self._special_on[device] = sent(self.special_ids, device)
        return (input_ids.unsqueeze(-1) == self._special_on[device]).any(-1)

    def _real_by_request(self, call: _Call) -> Tensor:
        """Which tokens (batch, time) are no padding by what `generate` was given; all of them outside of it."""
        real = torch.ones(call.shape, dtype=torch.bool, device=call.device)
        generation: _Generation | None = self._per_thread.__dict__.get("generation")
        if generation is not None:
            prompt = generation.request.real_of(call.shape[0])[:, call.past : call.num_columns]
            real[:, : prompt.shape[1]] = prompt.to(call.device)
        return real

    def _selected(self, call: _Call) -> Tensor:
        """Which tokens of a call (batch, time) the positions mean, padding or not."""
        anywhere = isinstance(self.positions, str) and self.positions == "all"
        if not anywhere or self.follows_texts:
            generation: _Generation | None = self._per_thread.__dict__.get("generation")
            text = self._of_forward(call) if generation is None else self._of_generation(generation, call)
            text.end, self._per_thread.current = call.num_columns, text
        if anywhere:
            return torch.ones(call.shape, dtype=torch.bool, device=call.device)
        places = torch.arange(call.past, call.num_columns, device=call.device) - text.first
        if isinstance(self.positions, str):
            return ((places < text.width) == (self.positions == "prompt")).expand(call.shape)
        assert text.chosen is not None
        # One column more, for everything behind the prompt.
        return nn.functional.pad(text.chosen, (0, 1))[:, places.clamp(max=text.width)]

    def _of_generation(self, generation: _Generation, call: _Call) -> _Text:
        """The text of a call in `generate`.

        Raises:
            SteeringError: it is another text than `generate` was given, or one in which the prompt's tokens cannot be
                found.
        """
        request = generation.request
        if self.follows_texts and request.num_beams > 1:
            raise SteeringError(
                "a gate with then='after' follows each text from its first token, and beams exchange texts; sample, "
                f"or give num_beams=1 (got {request.num_beams})."
            )
        if generation.text is not None:
            if generation.text.goes_on(call):
                return generation.text
            raise SteeringError(
                "generate ran the model on a second text (as guidance with a negative prompt does), so which of its "
                "tokens are the prompt is not known; steer positions='all'."
            )
        first = -1 if request.num_cached is None else call.past - request.num_cached
        if first < 0 or (call.input_ids is None) != request.has_embeds:
            raise SteeringError(
                "generate began with a cache that does not say how many tokens it holds, or with a learned prompt of "
                "embeddings, so which tokens are the prompt is not known; steer positions='all'."
            )
        generation.text = self._begin(call, request.real_of(call.shape[0]).to(call.device), first)
        return generation.text

    def _of_forward(self, call: _Call) -> _Text:
        """The text of a call outside of `generate`."""
        text: _Text | None = self._per_thread.__dict__.get("text")
        if not call.past:
            real = call.real
            if real is None and isinstance(self.positions, slice):
                raise SteeringError(
                    "the attention mask does not say which tokens are padding, and a slice is counted without it; "
                    "pass a mask (batch, tokens) or (batch, 1, tokens, tokens), or positions as a bool tensor."
                )
            real = torch.ones(call.shape, dtype=torch.bool, device=call.device) if real is None else real
            text = self._begin(call, real, first=0)
        elif text is None or call.shape[1] > 1 or not text.goes_on(call):
            raise SteeringError(
                f"the model was called with {call.shape[1]} tokens behind a cache of {call.past}, so whether they are "
                "of the prompt or generated is not known; begin with an empty cache inside the steering and go on by "
                "single tokens, use generate, or steer positions='all'."
            )
        self._per_thread.text = text
        return text

    def _begin(self, call: _Call, real: Tensor, first: int) -> _Text:
        """A text whose prompt (batch, width) begins in this call, or in the cache before it."""
        ids = None if call.input_ids is None or call.cache is not None else call.input_ids[:, : real.shape[1]]
        cache = None if call.cache is None else weakref.ref(call.cache)
        return _Text(first, real.shape[1], self._chosen(real), ids, cache, call.num_columns)

    def _chosen(self, real: Tensor) -> Tensor | None:
        """Which tokens of a prompt (batch, width) a slice or a mask means."""
        if isinstance(self.positions, slice):
            chosen = torch.zeros_like(real)
            for row, tokens in zip(chosen, real, strict=True):
                row[tokens.nonzero().squeeze(-1)[self.positions]] = True
            return chosen
        if not isinstance(self.positions, Tensor):
            return None
        mask = self.positions.to(real.device)
        mask = mask.expand(1, -1) if mask.ndim == 1 else mask
        if mask.shape[1] != real.shape[1] or real.shape[0] % mask.shape[0]:
            raise SteeringError(
                f"the mask of positions is {tuple(self.positions.shape)} and the prompt {tuple(real.shape)}; expected "
                "one value for each token of the prompt, padding included."
            )
        # As `generate` multiplies prompts for beams and for several answers.
        return mask.repeat_interleave(real.shape[0] // mask.shape[0], dim=0)


def check_positions(positions: Positions) -> None:
    """Raises SteeringError for what is no choice of positions."""
    if isinstance(positions, str):
        known = positions in NAMES
    elif isinstance(positions, Tensor):
        known = positions.dtype == torch.bool and positions.ndim in (1, 2)
    else:
        known = isinstance(positions, slice) and all(
            part is None or type(part) is int for part in (positions.start, positions.stop, positions.step)
        )
        known = known and (positions.step is None or positions.step > 0)
    if not known:
        raise SteeringError(
            f"positions must be {', '.join(map(repr, NAMES))}, a slice of the prompt with a positive step, or a bool "
            f"tensor (tokens,) or (batch, tokens); got {positions!r}."
        )


def find_special_ids(model: PreTrainedModel, special_ids: Iterable[int] | None) -> Tensor:
    """The ids given, or those that the model's configuration names: BOS, EOS and padding."""
    if special_ids is None:
        config = model.config.get_text_config().to_dict()
        values = [config.get(key) for key in SPECIAL_KEYS]
        listed = [value if isinstance(value, list) else [value] for value in values]
        special_ids = [index for indices in listed for index in indices if index is not None]
    return torch.tensor(sorted(set(special_ids)), dtype=torch.long)


def _read_call(given: Mapping[str, Any], num_seen: int) -> _Call:
    """A call with these arguments. `num_seen` tokens are in the cache if it is one that counts none."""
    input_ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens = embeds if input_ids is None else input_ids
    if tokens is None:
        raise SteeringError("the model was called without input_ids and without inputs_embeds.")
    shape, mask = tokens.shape[:2], given.get("attention_mask")
    keys, state = given.get("past_key_values"), given.get("cache_params")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= shape[1]:
        past = mask.shape[1] - shape[1]
    elif keys is None and isinstance(state, Cache):
        # A state-space model's cache does not know how many tokens it has seen; without a call before, at least one.
        past = max(1, num_seen) if state.has_previous_state() else 0
    else:
        past = 0 if keys is None else int(keys.get_seq_length())
    real = _real_tokens(mask, shape, past, tokens.device)
    return _Call(input_ids, shape, tokens.device, real, past, state if keys is None else keys)


def _real_tokens(mask: Any, shape: torch.Size, past: int, device: torch.device) -> Tensor | None:
    """Which tokens of a call (batch, time) are no padding by its attention mask, None where that does not say.

    A mask of tokens by tokens (batch, 1, time, past and time) has it on its diagonal, since real tokens see
    themselves. `generate` passes such masks with a static cache, in some models one for each kind of layer.
    """
    batch, time = shape
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if isinstance(mask, Mapping):
        found = (_real_tokens(one, shape, past, device) for one in mask.values())
        return next((real for real in found if real is not None), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2 and mask.shape[1] >= time:
        return mask[:, -time:].to(device) != 0
    if mask.ndim != 4 or mask.shape[2] != time or mask.shape[3] < past + time:
        return None
    own = mask[:, 0].diagonal(past, 1, 2)[:, :time].to(device)
    # Of floating-point masks, which are added to the scores, zero means seen.
    own = own == 0 if own.is_floating_point() else own != 0
    return own.expand(batch, -1)
