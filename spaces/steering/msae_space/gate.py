"""What is let in before Gradio sees it.

That is requests of this page's own and of programs, of the kinds and sizes that the page needs.

Gradio has routes for whatever any app may need, such as for uploads of any size, and lets the pages of any other site
ask a public one with its visitors' cookies.
"""

import json
import logging
import os
import re
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The page's own largest is what the Compare tab shows, of 512 tokens with their colours.
MAX_BODY, MAX_DEPTH, MAX_NUMBER = 1 << 20, 20, 2**63
logger = logging.getLogger(__name__)
READS, WRITES = ("GET", "HEAD", "OPTIONS"), ("POST",)
API = re.compile(r"/gradio_api/([\w-]*)")
# What is sent: a handler is called, by an agent perhaps, or an answer is no longer wanted.
SENT = {"queue", "call", "run", "api", "cancel", "reset", "mcp"}
# What is never fetched: it is of uploads, of other machines, or written to this one's disk.
NOT_FETCHED = {"upload_progress", "deep_link", "proxy", "file", "stream", "component_server"}


class Gate:
    """ASGI middleware that answers what it refuses with a sentence.

    It refuses requests of another site's pages (403), those that the page has no use for (404, 405), those that are
    too large for it (413), and bodies that are no plain JSON (400).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request, as ASGI has it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        refused = _refusal(scope)
        if refused is None and scope["method"] in WRITES:
            body = await _body(scope, receive)
            if body is None:
                refused = 413, f"This page takes requests of up to {MAX_BODY:,} bytes."
            elif not _is_plain(body):
                refused = 400, "This page takes JSON objects: finite numbers, whole characters, few levels."
            else:
                receive = _again(body, receive)
        if refused is None:
            await self._answer(scope, receive, send)
            return
        status, words = refused
        await PlainTextResponse(words + "\n", status)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What Gradio says, or that it cannot make anything of the request."""
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception as error:  # of a request for a handler that is none, say
            if begun:
                raise
            logger.warning("%s %s was not understood (%r).", scope["method"], scope["path"], error)
            await PlainTextResponse("This page has nothing of the kind.\n", 400)(scope, receive, send)


def _refusal(scope: Scope) -> tuple[int, str] | None:
    """The status and the sentence for a request that is refused whatever it carries."""
    headers, method = Headers(scope=scope), scope["method"]
    if not _is_own(headers):
        return 403, "This page answers its own visitors and programs, not the pages of other sites."
    if method not in READS + WRITES:
        return 405, f"This page takes {', '.join(READS + WRITES)}."
    found = API.search(scope["path"])
    kind = found[1] if found else None
    if (method in WRITES and kind not in SENT) or (method in READS and kind in NOT_FETCHED):
        return 404, "This page has nothing there."
    return None


def _is_own(headers: Headers) -> bool:
    """Whether a request is of no page (browsers name the page that asks), or of a page of the host that it asks."""
    origin = headers.get("origin")
    if origin is None:
        return True
    # Behind a proxy, a request may name the host that the visitor sees elsewhere; no page of another site can add
    # such a header without asking first, which is refused.
    hosts = {headers.get("host"), headers.get("x-forwarded-host"), os.environ.get("SPACE_HOST")}
    return urlsplit(origin).netloc.lower() in {host.lower() for host in hosts if host}


async def _body(scope: Scope, receive: Receive) -> bytes | None:
    """The whole body; None where it is too large, of which no more is read than shows it."""
    length = Headers(scope=scope).get("content-length", "0")
    if not length.isdecimal() or len(length) > 12 or int(length) > MAX_BODY:
        return None
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":  # whoever sent it has left
            return b""
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > MAX_BODY:
            return None
    return b"".join(parts)


def _is_plain(body: bytes) -> bool:
    """Whether a body is a JSON object that Gradio and what it is built on can work with."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return False
    level: list[Any] = [found]
    for _ in range(MAX_DEPTH):
        if not all(map(_is_plain_leaf, level)):
            return False
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in ([*one.keys(), *one.values()] if isinstance(one, dict) else one)
        ]
    session = found.get("session_hash") if isinstance(found, dict) else None
    return isinstance(found, dict) and not level and (session is None or _is_session(session))


def _is_plain_leaf(value: Any) -> bool:
    if isinstance(value, int | float):
        return abs(value) < MAX_NUMBER  # which neither infinity nor NaN is
    return not (isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value))


def _is_session(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-]{1,64}", value, re.ASCII) is not None


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that has been received, and then what else comes."""
    given = False

    async def give() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return give
