"""Answers in OpenAI's form, whole and in pieces."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from hf_msae.serving.asking import Asked
from hf_msae.serving.limits import RequestError
from hf_msae.serving.writing import Ended, News, Piece

DONE = "data: [DONE]\n\n"


def error_form(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The object that says what is wrong with a request, or that the server failed."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def of_error(error: RequestError) -> dict[str, Any]:
    """The object of a request that is refused."""
    return error_form(str(error), error.status, error.param, error.code)


class Answer:
    """What answers one request.

    Args:
        asked: The request.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.begins_with = {
            "id": f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.name,
        }
        self.num_tokens = 0

    async def whole(self, news: AsyncIterator[News]) -> dict[str, Any]:
        """The answer at once."""
        num_texts = len(self.asked.prompts) * self.asked.n
        texts, ends = [""] * num_texts, dict[int, Ended]()
        async for one in news:
            if isinstance(one, Piece):
                texts[one.index] += one.text
            else:
                ends[one.index] = one
                self.num_tokens += one.num_tokens
        choices = [self._choice(ends[index], texts[index]) for index in sorted(ends)]
        kind = {"object": "chat.completion"} if self.asked.is_chat else {}
        return {**self.begins_with, **kind, "choices": choices, "usage": self.usage()}

    async def events(self, news: AsyncIterator[News]) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        begun: set[int] = set()
        async for one in news:
            if one.index not in begun:
                begun.add(one.index)
                for delta in self._first_deltas():
                    yield self._event([{"index": one.index, "delta": delta, "logprobs": None, "finish_reason": None}])
            yield self._event([self._piece(one)])
            if isinstance(one, Ended):
                self.num_tokens += one.num_tokens
        if self.asked.usage_at_end:
            yield self._event([], usage=self.usage())
        yield DONE

    def usage(self) -> dict[str, int]:
        """How many tokens were read and written."""
        prompt = sum(len(one.ids) for one in self.asked.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": prompt + self.num_tokens,
        }

    def _choice(self, end: Ended, text: str) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self.asked.is_chat else {"text": text}
        return {"index": end.index, **content, "logprobs": None, "finish_reason": end.reason, **_latents(end)}

    def _first_deltas(self) -> Iterator[dict[str, str]]:
        if self.asked.is_chat:
            yield {"role": "assistant", "content": ""}

    def _piece(self, one: News) -> dict[str, Any]:
        reason, text = (None, one.text) if isinstance(one, Piece) else (one.reason, "")
        content: dict[str, Any] = {"text": text}
        if self.asked.is_chat:
            content = {"delta": {"content": text} if isinstance(one, Piece) else {}}
        latents = _latents(one) if isinstance(one, Ended) else {}
        return {"index": one.index, **content, "logprobs": None, "finish_reason": reason, **latents}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = {"object": "chat.completion.chunk"} if self.asked.is_chat else {}
        return event({**self.begins_with, **kind, "choices": choices, **more})


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _latents(end: Ended) -> dict[str, Any]:
    found = {"latents": end.latents, "prompt_latents": end.prompt_latents}
    return {name: value for name, value in found.items() if value is not None}
