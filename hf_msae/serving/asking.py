"""Reads what a request asks: the fields of OpenAI's completions and chats, and what is added to them.

Nothing is passed over in silence: a field that is not known, or one that is known and not supported, is refused, apart
from those that change nothing in the text.
"""

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_msae.serving.limits import Limits, RequestError
from hf_msae.serving.models import Served
from hf_msae.serving.steerings import LatentsWanted, read_steering, read_wanted
from hf_msae.steering import Steering

COMPLETION_TOKENS, CHAT_TOKENS = 16, 256  # where a request does not say how many; the first is OpenAI's
MAX_STOPS = 4
# Of OpenAI, without meaning for the text.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
# Of OpenAI and not supported, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}


@dataclass(frozen=True)
class Prompt:
    """A text to continue: its tokens, and itself where an answer repeats it."""

    ids: list[int]
    text: str = ""


@dataclass(frozen=True)
class Asked:
    """A request, checked.

    Args:
        name: The model as the request calls it.
        served: The models.
        steering: What is done to every text.
        prompts: The texts to continue.
        n: Continuations of each.
        max_tokens: Of each continuation.
        temperature: 0 takes the likeliest token.
        top_p: Share of the probability from which tokens are taken.
        top_k: How many of the likeliest tokens they are taken from; None for all.
        seed: Of the first text; each further one has the next.
        stop: Texts before which an answer ends.
        stream: Whether the answer comes in pieces.
        usage_at_end: Whether a streamed answer ends with the count of tokens.
        wanted: Which active latents are given back; None for none.
        echo: Whether the answer begins with the prompt.
        is_chat: Whether it answers a chat.
    """

    name: str
    served: Served
    steering: Steering
    prompts: list[Prompt]
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    seed: int
    stop: tuple[str, ...]
    stream: bool
    usage_at_end: bool
    wanted: LatentsWanted | None
    echo: bool
    is_chat: bool


class Fields:
    """The fields of a request, which are taken one by one; those that are left over are refused.

    Raises:
        RequestError: The request is no object, or a field has another kind of value than is expected.
    """

    def __init__(self, values: Any) -> None:
        if not isinstance(values, dict):
            raise RequestError(f"a request is a JSON object {{...}}, got {values!r:.80}.")
        self.left = dict(values)

    def take(self, name: str, default: Any = None) -> Any:
        """A field's value; null is the default."""
        value = self.left.pop(name, None)
        return default if value is None else value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A finite number."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise RequestError(f"{name} must be a number from {least:g} to {most:g}, got {value!r:.80}.", name)
        return float(value)

    def whole(self, name: str, default: int | None, least: int, most: int) -> int | None:
        """A whole number, or the default."""
        value = self.take(name, default)
        if value is not default and (
            isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most
        ):
            raise RequestError(f"{name} must be a whole number from {least} to {most}, got {value!r:.80}.", name)
        return value

    def switch(self, name: str) -> bool:
        """True or false, by default false."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be true or false, got {value!r:.80}.", name)
        return value

    def refuse_rest(self) -> None:
        """Raises RequestError for a field that nobody took, unless it asks for nothing."""
        for name, value in self.left.items():
            if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
                raise RequestError(f"{name}={value!r:.80} is not supported here; leave it out.", name)
            if name not in UNSUPPORTED and name not in IGNORED:
                raise RequestError(f"there is no {name!r:.80} in this request; leave it out.", name)


Names = Mapping[str, tuple[Served, Steering]]
Reader = Callable[[Any, Names, Limits], Asked]


def read_completion(values: Any, names: Names, limits: Limits) -> Asked:
    """A request to `/v1/completions`.

    Raises:
        RequestError: It cannot be answered.
    """
    fields = Fields(values)
    name, served, usual = _served(fields, names)
    echo = fields.switch("echo")
    prompts = _prompts(fields.take("prompt", ""), served)
    max_tokens = fields.whole("max_tokens", None, 1, limits.max_tokens)
    return _read(fields, name, served, usual, prompts, limits, max_tokens, COMPLETION_TOKENS, echo=echo, is_chat=False)


def read_chat(values: Any, names: Names, limits: Limits) -> Asked:
    """A request to `/v1/chat/completions`.

    Raises:
        RequestError: It cannot be answered.
    """
    fields = Fields(values)
    name, served, usual = _served(fields, names)
    prompts = [_chat_prompt(fields.take("messages"), served)]
    older = fields.whole("max_tokens", None, 1, limits.max_tokens)
    max_tokens = fields.whole("max_completion_tokens", older, 1, limits.max_tokens)
    return _read(fields, name, served, usual, prompts, limits, max_tokens, CHAT_TOKENS, echo=False, is_chat=True)


def _served(fields: Fields, names: Names) -> tuple[str, Served, Steering]:
    name = fields.take("model")
    if not isinstance(name, str) or name not in names:
        raise RequestError(
            f"there is no model {name!r:.80}; there are {', '.join(map(repr, names))}.",
            "model",
            status=404,
            code="model_not_found",
        )
    return name, *names[name]


def _read(
    fields: Fields,
    name: str,
    served: Served,
    usual: Steering,
    prompts: list[Prompt],
    limits: Limits,
    max_tokens: int | None,
    default_tokens: int,
    **kind: bool,
) -> Asked:
    """What both kinds of request have in common."""
    n = fields.whole("n", 1, 1, limits.max_texts)
    assert n is not None
    if len(prompts) * n > limits.max_texts:
        raise RequestError(
            f"{len(prompts)} prompts times n={n} are {len(prompts) * n} texts, where {limits.max_texts} are the most; "
            "send several requests.",
            "n",
        )
    stream = fields.switch("stream")
    options = Fields(fields.take("stream_options", {}))
    given = fields.take("steering")
    if given is not None and usual.edits:
        raise RequestError(f"the model {name!r} is steered by its name; ask for {served.name!r} instead.", "steering")
    seed = fields.whole("seed", None, -(2**63), 2**63 - 1)
    asked = Asked(
        name=name,
        served=served,
        steering=usual if given is None else read_steering(given, served, limits),
        prompts=prompts,
        n=n,
        max_tokens=_fitting(prompts, served, max_tokens, min(default_tokens, limits.max_tokens)),
        temperature=fields.number("temperature", 1.0, 0.0, 2.0),
        top_p=fields.number("top_p", 1.0, math.ulp(0.0), 1.0),
        top_k=fields.whole("top_k", None, 1, 2**31),
        # Torch takes seeds below 2**64, and each text of a request gets the next one.
        seed=secrets.randbits(32) if seed is None else seed % 2**62,
        stop=_stops(fields.take("stop", [])),
        stream=stream,
        usage_at_end=options.switch("include_usage"),
        wanted=read_wanted(fields.take("return_latents"), served),
        echo=kind["echo"],
        is_chat=kind["is_chat"],
    )
    fields.refuse_rest()
    return asked


def _fitting(prompts: list[Prompt], served: Served, asked: int | None, usual: int) -> int:
    """How many tokens are written: as many as asked, or as usual and as there is room for.

    Raises:
        RequestError: There is no room for them.
    """
    longest, most = max(len(prompt.ids) for prompt in prompts), served.context_length
    room = usual if most is None else most - longest
    if room < 1 or (asked is not None and most is not None and asked > room):
        raise RequestError(
            f"the model reads {most} tokens, and the prompt has {longest} with {asked or 1} to follow; shorten the "
            "prompt or ask for fewer.",
            "max_tokens" if room >= 1 else None,
            code="context_length_exceeded",
        )
    return min(usual, room) if asked is None else asked


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(one, str) and one for one in stops):
        raise RequestError(f"stop must be a text or up to {MAX_STOPS} texts, none empty; got {value!r:.80}.", "stop")
    return tuple(stops)


def _prompts(value: Any, served: Served) -> list[Prompt]:
    """The prompts of a completion: a text, tokens, or several of either."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_id(value[0])):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RequestError(
            f"prompt must be a text, a list of token ids, or a list of these; got {value!r:.80}.", "prompt"
        )
    return [_text_prompt(one, served) if isinstance(one, str) else _id_prompt(one, served) for one in value]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text_prompt(text: str, served: Served) -> Prompt:
    _check_text(text, "prompt")
    with served.tokenizing:
        ids = served.pipe.preprocess(text)["input_ids"][0].tolist()
    return Prompt(ids or _beginning(served), text)


def _beginning(served: Served) -> list[int]:
    """What stands for an empty prompt."""
    bos = served.tokenizer.bos_token_id
    if bos is None:
        raise RequestError("the prompt is empty, and the model has no token to begin with; give a text.", "prompt")
    return [bos]


def _id_prompt(value: Any, served: Served) -> Prompt:
    size = served.pipe.model.config.get_text_config().vocab_size
    if not isinstance(value, list) or not value or not all(_is_id(one) and 0 <= one < size for one in value):
        raise RequestError(
            f"a prompt is a text or a list of token ids from 0 to {size - 1}, got {value!r:.80}.", "prompt"
        )
    return Prompt(value, str(served.tokenizer.decode(value, skip_special_tokens=True)))


def _chat_prompt(messages: Any, served: Served) -> Prompt:
    if served.tokenizer.chat_template is None:
        raise RequestError(
            f"the tokenizer of {served.name!r} has no chat template; send a prompt to /v1/completions.", "messages"
        )
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages must be a list with at least one message, got {messages!r:.80}.", "messages")
    chat = [_message(one) for one in messages]
    from jinja2 import TemplateError

    try:
        with served.tokenizing:
            found: Any = served.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    except (TemplateError, ValueError, TypeError) as error:
        raise RequestError(
            f"the chat template of the model refuses these messages: {error!s:.200}.", "messages"
        ) from None
    return Prompt(list(found["input_ids"]))


def _message(value: Any) -> dict[str, str]:
    """A message as templates take it, with parts of text put together."""
    content = value.get("content") if isinstance(value, dict) else None
    if isinstance(content, list) and all(isinstance(one, dict) and one.get("type") == "text" for one in content):
        parts = [one.get("text") for one in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str) or not isinstance(value.get("role"), str):
        raise RequestError(f"a message has a role and a content of text, got {value!r:.120}.", "messages")
    _check_text(content, "messages")
    _check_text(value["role"], "messages")
    return {"role": value["role"], "content": content}


def _check_text(text: str, param: str) -> None:
    """Raises RequestError for half a character, which JSON can write and no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(f"the text in {param} is no Unicode: a surrogate stands alone.", param) from None
