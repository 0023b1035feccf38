"""Which token each vector of an activation belongs to, told from the tokens that the model was called with.

A layer cannot vouch for itself: one that keeps the sequence before the batch shows each of its modules the same. So
shapes are compared with `input_ids` (or `inputs_embeds`) of the model around the layer. Shapes do not tell a batch of
as many rows as tokens from its transpose, nor the orders of a flattened batch; there a probe does, which changes some
tokens of a small batch and looks at which vectors follow.
"""

import inspect
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# A row that kept its tokens may move by rounding, and no more than this much of what a row with new tokens moves.
_LEAK = 0.25


@dataclass
class Layout:
    """Follows the calls of a model, and gives an activation the shape of the tokens. Calls are kept per thread."""

    _per_thread: threading.local = field(default_factory=threading.local)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A model, or one inside it, is called."""
        given = call_arguments(module, args, kwargs)
        tokens = given.get("input_ids")
        shapes = [_leading(given.get("inputs_embeds") if tokens is None else tokens)]
        # Where the decoder is no model of its own, both sequences are in one call.
        shapes += [_leading(given.get(name)) for name in ("decoder_input_ids", "decoder_inputs_embeds")]
        self._calls.append((module, list(dict.fromkeys(shape for shape in shapes if shape is not None))))

    def leave(self, module: nn.Module) -> None:
        """The call of a model is over."""
        if self._calls and self._calls[-1][0] is module:
            self._calls.pop()

    def enter_layer(self, hidden: Any) -> None:
        """The layer around the site is given `hidden`. It counts only where no call of a model is under way."""
        self._per_thread.layer = _leading(hidden) if isinstance(hidden, Tensor) and hidden.ndim == 3 else None

    def per_token(self, value: Any) -> Tensor | None:
        """An activation as (batch, sequence, hidden); None where it is not one floating-point vector a token."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        shapes = self._shapes()
        if value.ndim == 3 and (not shapes or _leading(value) in shapes):
            return value
        fitting = [shape for shape in shapes if value.ndim == 2 and shape.numel() == len(value)]
        return value.unflatten(0, fitting[0]) if len(fitting) == 1 else None

    def describe(self) -> str:
        """What shapes are compared with, for messages."""
        if shapes := self._shapes():
            source = "the model was called" if self._called() else "its layer was called"
            return f", where {source} with (batch, sequence) = {' and '.join(str(tuple(shape)) for shape in shapes)}"
        return ""

    @property
    def _calls(self) -> list[tuple[nn.Module, list[torch.Size]]]:
        return self._per_thread.__dict__.setdefault("calls", [])

    def _called(self) -> list[torch.Size]:
        """The tokens of the innermost call that has any: `inputs_embeds` may be longer than the outer `input_ids`."""
        return next((shapes for _, shapes in reversed(self._calls) if shapes), [])

    def _shapes(self) -> list[torch.Size]:
        # A layer runs outside of any call where gradient checkpointing runs it again.
        layer = self._per_thread.__dict__.get("layer")
        return self._called() or ([] if layer is None else [layer])


def call_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def token_shapes(inputs: Mapping[str, Any]) -> list[torch.Size]:
    """(batch, sequence) of every sequence of tokens in a model's inputs."""
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels")
    return [shape for name in names if (shape := _leading(inputs.get(name))) is not None]


def probe_tokens(vocab_size: int, length: int, device: torch.device, draw: int) -> list[Tensor]:
    """Three batches of ids (2, length): a first; the same with another second row; and with that row's last changed.

    draw: different numbers give different ids.
    """
    count = 3 * length + 1
    ids = ((2 * torch.arange(count) + 1) * vocab_size // (2 * count) + draw) % vocab_size
    first, second, other = ids[:-1].view(3, length)
    changed = torch.cat([second[:-1], ids[-1:]])
    return [torch.stack([first, row]).to(device) for row in (second, other, changed)]


def misplacement(plain: Tensor, other_row: Tensor, last_changed: Tensor) -> str | None:
    """What is wrong with the order of the activations (2, sequence, hidden) at `probe_tokens`; None where nothing is.

    Rows must not know of each other; and where the last token alone is another one, its own vector must change.
    """
    rounding = 4 * torch.finfo(plain.dtype).eps
    for changed, what in ((other_row, "other text"), (last_changed, "another last token")):
        kept, moved = _change(plain, changed)
        if kept.max() > max(_LEAK * float(moved.max()), rounding):
            return f"with {what} in the second row of a batch, vectors of its first row changed"
    if moved[-1] == 0 and moved.max() > rounding:
        return "with another last token in a row, vectors of the tokens before it changed and its own did not"
    return None


def _change(before: Tensor, after: Tensor) -> Tensor:
    """How far each vector moved, (2, sequence), as a share of the lengths before and after."""
    before, after = before.double(), after.double()
    length = before.norm(dim=-1) + after.norm(dim=-1)
    # A vector that is zero in both has not moved.
    return ((after - before).norm(dim=-1) / length.clamp(min=torch.finfo(torch.float64).tiny)).cpu()


def _leading(value: Any) -> torch.Size | None:
    return value.shape[:2] if isinstance(value, Tensor) and value.ndim >= 2 else None
