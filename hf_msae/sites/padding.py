"""What whoever puts windows together knows of their padding, so that transformers need not ask the device.

Before attention, transformers looks at numbers: whether the mask hides anything, and whether positions begin anew
within a row. On a GPU each such look waits for all that was asked of it before, so no pass could be asked for while
another runs. A batch that was collated here is known: each row is one sequence, and it has a mask only where something
is padded. Its answers are given in place of transformers' functions, in this thread and while the context is open;
they are what these would find, so activations are the same to the bit.

Left as they are: flash attention, which takes padding out by counting it, and what an architecture asks by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, masking_utils

from hf_msae.process_wide import SharedSetting, eager

# Whether the batch that is on its way is padded; None where nobody said.
_PADDED: ContextVar[bool | None] = ContextVar("hf_msae_padded", default=None)

Function = Callable[..., Any]


@contextmanager
def known_padding(padded: bool) -> Iterator[None]:
    """While the context is open, this thread's forwards take rows of one sequence each.

    Args:
        padded: Whether they are given an attention mask, which then hides at least one token.
    """
    # What is compiled meanwhile would keep these answers.
    with eager(), _ANSWERED():
        before = _PADDED.set(padded)
        try:
            yield
        finally:
            _PADDED.reset(before)


def _whether_masked(asked: Function) -> Function:
    """Whether attention does without the mask: not where it is known to hide something."""

    @wraps(asked)
    def answer(padding_mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        return False if _PADDED.get() and padding_mask is not None else asked(padding_mask, *args, **kwargs)

    return answer


def _which_sequences(asked: Function) -> Function:
    """Which sequences a row holds: None for a single one.

    Positions that all rows share in memory depend on no token, so the model has counted them from the first place on.
    Of a single row this does not show, and transformers looks.
    """

    @wraps(asked)
    def answer(position_ids: Tensor) -> Any:
        known = _PADDED.get() is not None and position_ids.stride(0) == 0
        return None if known else asked(position_ids)

    return answer


def _no_warning(asked: Function) -> Function:
    """The warning of padding without a mask, for which it looks at tokens."""

    @wraps(asked)
    def answer(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return asked(model, *args, **kwargs) if _PADDED.get() is None else None

    return answer


_ANSWERS: list[tuple[Any, str, Callable[[Function], Function]]] = [
    (masking_utils, "_ignore_causal_mask_sdpa", _whether_masked),
    (masking_utils, "_ignore_bidirectional_mask_sdpa", _whether_masked),
    (masking_utils, "find_packed_sequence_indices", _which_sequences),
    (PreTrainedModel, "warn_if_padding_and_no_attention_mask", _no_warning),
]


@contextmanager
def _answered() -> Iterator[None]:
    with ExitStack() as stack:
        for place, name, answer in _ANSWERS:
            # A version of transformers without one of them asks as it does.
            if (asked := vars(place).get(name)) is not None:
                stack.callback(setattr, place, name, asked)
                setattr(place, name, answer(asked))
        yield


_ANSWERED = SharedSetting(_answered)
