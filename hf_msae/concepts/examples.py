"""Labelled examples of a concept: texts with it and texts without it, read, checked, halved and run.

One half is for choosing and fitting, the other tells how well that went. What stands in both halves would be known
beforehand, so equal texts count once.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data import Window, as_documents, pad_id, vocabulary
from hf_msae.data.documents import DocumentsLike
from hf_msae.data.forward import leave_out
from hf_msae.data.sources import UnreadableRow
from hf_msae.data.windows import DocumentEncoder
from hf_msae.errors import InputError
from hf_msae.evaluation.activations import run_model
from hf_msae.outliers import within_limit
from hf_msae.sites import Site

# Of each kind. With fewer, the half that is held out has less than five, and chance alone looks like knowledge.
MIN_EXAMPLES = 10
# Of each kind; more are left out.
MAX_EXAMPLES = 500
NO_NEXT = -1


class ConceptError(InputError):
    """Examples, words or a model from which nothing can be learnt about a concept."""


@dataclass(frozen=True)
class Texts:
    """Texts of one kind or both, run through the language model.

    Args:
        windows: one a text.
        x: activations of the tokens that count, (num_tokens, hidden_size), in the order of the windows.
        text_of: the text of each, (num_tokens,) int64.
        next_ids: the token behind each, (num_tokens,) int64; `NO_NEXT` behind the last of a text.
        positive: which texts have the concept, (num_texts,) bool.
    """

    windows: list[Window]
    x: Tensor
    text_of: Tensor
    next_ids: Tensor
    positive: Tensor

    @property
    def of_positive(self) -> Tensor:
        """Which tokens are of texts with the concept, (num_tokens,) bool."""
        return self.positive[self.text_of]

    def negatives(self) -> list[Window]:
        """The windows without the concept."""
        return [window for window, has in zip(self.windows, self.positive.tolist(), strict=True) if not has]

    @torch.no_grad()
    def means(self, encode: Callable[[Tensor], Tensor], at_once: int) -> Tensor:
        """Means over each text of features of its tokens, (num_texts, width) float32 on the CPU.

        Args:
            encode: gives features of activations.
            at_once: tokens to encode together.
        """
        sums = torch.zeros(0)
        for x, rows in zip(self.x.split(at_once), self.text_of.split(at_once), strict=True):
            features = encode(x).float().cpu()
            if not len(sums):
                sums = torch.zeros(len(self.windows), features.shape[1])
            sums.index_add_(0, rows, features)
        return sums / torch.bincount(self.text_of, minlength=len(self.windows)).clamp_min(1)[:, None]


def read_windows(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    documents: DocumentsLike,
    context_length: int,
    called: str,
) -> list[Window]:
    """The different texts among some documents, each from its beginning, as many as count at most.

    Args:
        tokenizer: of the language model.
        model: the language model.
        documents: as `as_documents` takes them.
        context_length: tokens of a text that are read.
        called: what the texts are called in errors.

    Raises:
        ConceptError: there are fewer than are needed.
    """
    encoder = DocumentEncoder(tokenizer, vocabulary(model))
    found: dict[tuple[int, ...], Window] = {}
    num_read = 0
    # What looked for examples of its own may have found none.
    is_empty = isinstance(documents, Sequence) and not documents
    for document in () if is_empty else as_documents(documents):
        (ids,) = encoder.encode_each([document])
        if isinstance(ids, UnreadableRow) or not ids:
            continue
        num_read += 1
        ids = ids[:context_length]
        found.setdefault(tuple(ids), encoder.window(ids))
        if len(found) == MAX_EXAMPLES:
            break
    if len(found) < MIN_EXAMPLES:
        equal = f", {num_read - len(found):,} more repeat them" if num_read > len(found) else ""
        hint = " In a .txt file blank lines separate examples, unless a separator is given." if num_read < 3 else ""
        raise ConceptError(
            f"{called}: {len(found)} different examples were given{equal}, and {MIN_EXAMPLES} are needed; give more."
            + hint
        )
    return list(found.values())


def check_apart(positive: list[Window], negative: list[Window], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConceptError where a text stands on both sides."""
    shared = {tuple(window.input_ids.tolist()) for window in positive} & {
        tuple(window.input_ids.tolist()) for window in negative
    }
    if shared:
        text = tokenizer.decode(list(min(shared)), skip_special_tokens=True)
        raise ConceptError(
            f"{len(shared):,} of the examples are positive and negative at once, such as {text[:60]!r}; an example "
            "shows the concept or does not, so take each out on one side."
        )


def halves(windows: list[Window], seed: int) -> tuple[list[Window], list[Window]]:
    """The windows for fitting and those that are held out.

    Args:
        windows: of texts of one kind.
        seed: of the division.
    """
    order = random.Random(seed).sample(range(len(windows)), len(windows))
    return [windows[index] for index in order[::2]], [windows[index] for index in order[1::2]]


def run_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    site: Site,
    positive: list[Window],
    negative: list[Window],
    norm_limit: float | None,
    lm_batch_size: int,
) -> Texts:
    """Both kinds of texts with their activations; outliers do not count.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        site: where in it.
        positive: texts with the concept.
        negative: texts without it.
        norm_limit: beyond which activations are outliers; None or 0 for no limit.
        lm_batch_size: texts per forward pass.
    """
    windows = [*positive, *negative]
    x = run_model(model, site, windows, pad_id(tokenizer, vocabulary(model)), lm_batch_size, "Examples")
    inlying = within_limit(x, norm_limit)
    windows = leave_out(windows, inlying)
    counts = torch.tensor([int(window.keep.sum()) for window in windows])
    following = [_following(window) for window in windows]
    has = torch.arange(len(windows)) < len(positive)
    return Texts(windows, x[inlying], torch.repeat_interleave(counts), torch.cat(following), has)


def _following(window: Window) -> Tensor:
    """The token behind each token that counts."""
    behind = torch.cat([window.input_ids[1:], window.input_ids.new_tensor([NO_NEXT])])
    return behind[window.keep]
