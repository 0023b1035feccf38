"""Which tokens are steered: found anew for every forward of the model, from what it was called with.

Padding and special tokens (BOS above all, whose activations are outliers in most models) never are. Whether a token is
of the prompt or generated is told by the cache: a forward with an empty one begins a prompt. Where none is passed, a
forward of one token more than the last that begins with the prompt goes on from it, as `generate(use_cache=False)`.
"""

import inspect
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from hf_msae.steering.edits import SteeringError

Positions = Literal["all", "prompt", "generated"] | slice | Tensor
NAMES = ("all", "prompt", "generated")
SPECIAL_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class _Prompt:
    """The prompt that is being continued: its tokens (batch, width) where known, and which of them were chosen."""

    width: int
    input_ids: Tensor | None = None
    chosen: Tensor | None = None


@dataclass
class _Call:
    """One forward: its tokens (batch, time) if it got tokens, which are no padding, and how many are in the cache."""

    input_ids: Tensor | None
    real: Tensor
    past: int
    has_cache: bool

    @property
    def num_columns(self) -> int:
        """How many tokens the sequence has by now, padding included."""
        return self.past + self.real.shape[1]


@dataclass(eq=False)
class TokenTracker:
    """Watches the calls of a model and says which tokens of the running one are steered.

    positions: "all", "prompt", "generated"; a slice of each row's prompt, counted without its padding; or a mask of
        prompt tokens (tokens,) or (batch, tokens), padding included. Slices and masks leave generated tokens alone.
    special_ids: tokens that are never steered.

    What it has seen is kept per thread, as a generation runs in one.
    """

    positions: Positions
    special_ids: Tensor
    _seen: threading.local = field(default_factory=threading.local)

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_outermost: bool) -> None:
        """Read a call of the model or of a model inside it: some heads pass over the base model, to a decoder."""
        given = _arguments(module, args, kwargs)
        input_ids = given.get("input_ids")
        if not is_outermost and (input_ids is None or input_ids is self._seen.__dict__.get("input_ids")):
            return
        last = self._seen.__dict__.get("num_columns", 0)
        call = _read_call(given, num_seen=last)
        allowed = call.real
        if input_ids is not None:
            allowed = allowed & ~torch.isin(input_ids, self.special_ids.to(input_ids.device))
        self._seen.steered = allowed & self._selected(call, last)
        self._seen.num_columns, self._seen.input_ids = call.num_columns, input_ids

    def steered(self, hidden: Tensor) -> Tensor:
        """Which tokens of an activation (batch, time, hidden_size) are steered, (batch, time), in this forward.

        Raises SteeringError where the model was not called as a whole, or splits its tokens differently at the site.
        """
        steered = self._seen.__dict__.get("steered")
        if steered is None or steered.shape != hidden.shape[:2]:
            shape = None if steered is None else tuple(steered.shape)
            raise SteeringError(
                f"the site has activations for (batch, time) = {tuple(hidden.shape[:2])}, and the model was called "
                f"with {shape}; call the model itself rather than one of its modules."
            )
        return steered.to(hidden.device)

    def _selected(self, call: _Call, last: int) -> Tensor:
        if isinstance(self.positions, str) and self.positions == "all":
            return torch.ones_like(call.real)
        prompt = self._prompt(call, last)
        columns = torch.arange(call.past, call.num_columns, device=call.real.device)
        if isinstance(self.positions, str):
            return (columns < prompt.width) == (self.positions == "prompt")
        if prompt.chosen is None:
            return torch.zeros_like(call.real)
        # One column more, for everything behind the prompt.
        chosen = nn.functional.pad(prompt.chosen, (0, 1))
        return chosen[:, columns.clamp(max=prompt.width)]

    def _prompt(self, call: _Call, last: int) -> _Prompt:
        """The prompt that this call begins or goes on from, where the last call ended with `last` tokens."""
        known: _Prompt | None = self._seen.__dict__.get("prompt")
        if call.past and known is None:
            known = _Prompt(call.past)  # its cache was filled before the steering began
        if known is None or not (call.past or (call.num_columns == last + 1 and _goes_on(call, known))):
            known = _Prompt(call.real.shape[1], call.input_ids, self._chosen(call.real))
        self._seen.prompt = known
        return known

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
        known = isinstance(positions, slice) and (positions.step is None or positions.step > 0)
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


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _read_call(given: Mapping[str, Any], num_seen: int) -> _Call:
    """A call with these arguments. `num_seen` tokens are in the cache if it is one that counts none."""
    input_ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens = embeds if input_ids is None else input_ids
    if tokens is None:
        raise SteeringError("the model was called without input_ids and without inputs_embeds.")
    batch, time = tokens.shape[:2]
    keys, state = given.get("past_key_values"), given.get("cache_params")
    has_cache = keys is not None or state is not None
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= time:
        return _Call(input_ids, mask[:, -time:].to(tokens.device) != 0, mask.shape[1] - time, has_cache)
    # With a static cache, `generate` passes a mask that no longer says what is padding; then the padding token's id
    # alone keeps it from being steered.
    real = torch.ones((batch, time), dtype=torch.bool, device=tokens.device)
    if keys is None and isinstance(state, Cache):
        # A state-space model's cache does not know how many tokens it has seen; without a call before, at least one.
        return _Call(input_ids, real, max(1, num_seen) if state.has_previous_state() else 0, has_cache)
    return _Call(input_ids, real, 0 if keys is None else int(keys.get_seq_length()), has_cache)


def _goes_on(call: _Call, prompt: _Prompt) -> bool:
    """Whether a call without a cache has the prompt's tokens at its beginning, and more."""
    ids, before = call.input_ids, prompt.input_ids
    if call.has_cache or ids is None or before is None or len(ids) != len(before) or ids.shape[1] <= prompt.width:
        return False
    return torch.equal(ids[:, : prompt.width], before)
