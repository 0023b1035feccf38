"""Writes the texts of a request, in a thread of its own and inside its own steering.

The thread runs `generate` as `SteeredPipeline` does, with randomness of its own (`hf_msae.steering.sampling`), so that
a text depends on nothing but what was asked. It tells of each piece as it comes, and ends soon after `stopped` is set.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hf_msae.outliers import within_limit
from hf_msae.serving.asking import Asked, Prompt
from hf_msae.serving.models import Served
from hf_msae.serving.steerings import LatentsWanted
from hf_msae.serving.text import TextPieces
from hf_msae.sites import in_this_thread, recorded_site, replace, resolve_site

TokenLatents = list[dict[str, Any]]


@dataclass(frozen=True)
class Piece:
    """More of a text. `index` says which of the request's."""

    index: int
    text: str


@dataclass(frozen=True)
class Ended:
    """The end of a text.

    Args:
        index: Which of the request's texts.
        reason: "stop" for the model's own end or a text to stop at, "length" for as many tokens as asked.
        num_tokens: How many it has, its end included.
        latents: Those active on each of its tokens, where they are wanted.
        prompt_latents: Those on the prompt's, where they are wanted.
    """

    index: int
    reason: str
    num_tokens: int
    latents: TokenLatents | None = None
    prompt_latents: TokenLatents | None = None


News = Piece | Ended
Tell = Callable[[News], object]


def write(asked: Asked, tell: Tell, stopped: threading.Event) -> None:
    """Write all texts of a request, one after another.

    Args:
        asked: The request.
        tell: Called with each piece and each end.
        stopped: When set, no more is written.
    """
    for index in range(len(asked.prompts) * asked.n):
        if not stopped.is_set():
            _write_one(asked, index, tell, stopped)


def _write_one(asked: Asked, index: int, tell: Tell, stopped: threading.Event) -> None:
    served, prompt = asked.served, asked.prompts[index // asked.n]
    if asked.echo:
        tell(Piece(index, prompt.text))
    pieces = TextPieces(served.tokenizer, prompt.ids, asked.stop)
    text = _Text(index, asked.max_tokens, served.end_ids, pieces, tell, reads_last=asked.wanted is not None)
    with _activations(served, asked.wanted) as seen:
        served.pipe.with_steering(asked.steering).forward(
            _inputs(prompt),
            seed=asked.seed + index,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            num_beams=1,
            num_return_sequences=1,
            # One token more has the model read the last one, whose latents are wanted.
            max_new_tokens=asked.max_tokens + text.reads_last,
            streamer=text,
            stopping_criteria=StoppingCriteriaList([_Enough(text, stopped)]),
        )
    if stopped.is_set() and text.reason is None:
        return
    rest = pieces.end()
    if rest:
        tell(Piece(index, rest))
    latents = prompt_latents = None
    if asked.wanted is not None:
        x = torch.cat(seen, dim=1)[0] if seen else torch.empty(0)
        width = len(prompt.ids)
        latents = _latents(served, asked.wanted, text.ids, x[width:])
        prompt_latents = _latents(served, asked.wanted, prompt.ids, x[:width]) if asked.wanted.prompt else None
    tell(Ended(index, text.reason or "length", text.num_tokens, latents, prompt_latents))


def _inputs(prompt: Prompt) -> dict[str, Any]:
    """As the pipeline's own `preprocess` makes them."""
    ids = torch.tensor([prompt.ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompt_text": prompt.text}


@dataclass
class _Text(BaseStreamer):
    """Takes the tokens of one text as `generate` chooses them, and knows when it has ended.

    `ids` are those that it shows: without the token that ends it, and without one that only has the last one read.
    """

    index: int
    max_tokens: int
    end_ids: frozenset[int]
    pieces: TextPieces
    tell: Tell
    reads_last: bool
    ids: list[int] = field(default_factory=list)
    num_tokens: int = 0
    reason: str | None = None
    has_begun: bool = False
    is_over: bool = False

    def put(self, value: Tensor) -> None:
        """Takes the prompt first, then each new token."""
        if not self.has_begun:
            self.has_begun = True
            return
        for token in value.flatten().tolist():
            self._add(token)

    def end(self) -> None:
        """Does nothing: the reason why a text ended is found with its last token."""

    def _add(self, token: int) -> None:
        if self.reason is not None:
            self.is_over = True
            return
        self.num_tokens += 1
        if token in self.end_ids:
            self.reason, self.is_over = "stop", True
            return
        self.ids.append(token)
        piece = self.pieces.add(token)
        if piece:
            self.tell(Piece(self.index, piece))
        if self.pieces.ended:
            self.reason = "stop"
        elif self.num_tokens == self.max_tokens:
            self.reason = "length"
        self.is_over = self.reason is not None and not self.reads_last


class _Enough(StoppingCriteria):
    """Ends `generate` where the text is over, or nobody wants it any more."""

    def __init__(self, text: _Text, stopped: threading.Event) -> None:
        self.text, self.stopped = text, stopped

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        over = self.text.is_over or self.stopped.is_set()
        return torch.full((len(input_ids),), over, dtype=torch.bool, device=input_ids.device)


@contextmanager
def _activations(served: Served, wanted: LatentsWanted | None) -> Iterator[list[Tensor]]:
    """The activations (1, tokens, hidden_size) of each forward that this thread runs, as the model goes on from them.

    Outside of the steering, and so seen after it: of contexts at one site the inner one acts first.
    """
    seen: list[Tensor] = []
    if wanted is None:
        yield seen
        return

    def keep(hidden: Tensor) -> Tensor:
        # What runs next may add into this tensor in place.
        seen.append(hidden.detach().clone())
        return hidden

    model = served.pipe.model
    site = resolve_site(model, recorded_site(served.pipe.saes[wanted.sae].config, called=wanted.sae))
    with replace(model, {site: keep}, in_this_thread()):
        yield seen


@torch.no_grad()
def _latents(served: Served, wanted: LatentsWanted, ids: Sequence[int], x: Tensor) -> TokenLatents:
    """The strongest latents on each token, by activations (tokens, hidden_size); none on outliers."""
    sae = served.pipe.saes[wanted.sae]
    x = x[: len(ids)]
    found: TokenLatents = []
    if not len(x):
        return found
    activations = sae.encode(x.to(sae.device, sae.W_dec.dtype)).float()
    activations = torch.where(within_limit(x, sae.config.norm_limit).to(sae.device).unsqueeze(-1), activations, 0)
    values, indices = activations.topk(min(wanted.top, activations.shape[1]))
    for token, row, latents in zip(ids, values.tolist(), indices.tolist(), strict=False):
        active = [
            {"latent": latent, "activation": value} for latent, value in zip(latents, row, strict=True) if value > 0
        ]
        found.append({"token": served.tokenizer.decode([token]), "token_id": token, "latents": active})
    return found
