"""The routes of the server, on FastAPI.

FastAPI is imported where the app is made, because only who serves has it installed.
"""

import asyncio
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from hf_msae.errors import HfMsaeError, InputError
from hf_msae.serving.answers import DONE, Answer, error_form, event, of_error
from hf_msae.serving.asking import Names, Reader, read_chat, read_completion
from hf_msae.serving.desk import Desk
from hf_msae.serving.limits import Limits, RequestError
from hf_msae.serving.models import Served, by_name
from hf_msae.serving.writing import News

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

logger = logging.getLogger(__name__)
FAILED = "the server failed to write this text; its log says why."
# Whoever asked has left, and reads no answer; the status is that of nginx.
LEFT = 499
# Seconds that answers have to end when the server is told to.
GRACE = 5


def build_app(served: Sequence[Served], limits: Limits | None = None, *, api_key: str | None = None) -> "FastAPI":
    """The server as an ASGI app.

    Args:
        served: The models; requests name them.
        limits: What a request may ask for.
        api_key: What clients must give as theirs; None lets everybody in.

    Returns:
        The app, for uvicorn or any other ASGI server.

    Raises:
        InputError: Two models have one name, or FastAPI is not installed.
    """
    try:
        from fastapi import Depends, FastAPI, Request
        from fastapi.responses import JSONResponse
    except ImportError as error:
        raise InputError("The server needs FastAPI and uvicorn: pip install 'hf-msae[serve]'") from error

    names, limits = by_name(served), limits or Limits()
    desk = Desk(limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        desk.close()

    def check_key(request: Request) -> None:
        _check_key(request, api_key)

    app = FastAPI(
        title="hf-msae", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan,
        dependencies=[Depends(check_key)],
    )  # fmt: skip
    app.state.desk = desk
    _handle_errors(app)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "requests": desk.num_taken}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_form(name, names) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _model_form(name, names)

    async def answer(request: Request, read: Reader) -> "Response":
        values = await _read_body(request, limits.max_body)
        asked = await asyncio.to_thread(read, values, names, limits)
        job = desk.take(asked)
        news = job.follow(request.is_disconnected)
        if asked.stream:
            return await _stream(Answer(asked), news)
        whole = await Answer(asked).whole(news)
        if await request.is_disconnected():
            raise RequestError("whoever asked has left.", status=LEFT)
        return JSONResponse(whole)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        return await answer(request, read_completion)

    @app.post("/v1/chat/completions")
    async def chats(request: Request) -> Any:
        return await answer(request, read_chat)

    return app


def _check_key(request: "Request", api_key: str | None) -> None:
    """Raises RequestError where the server wants a key and is given none, or another."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if api_key is not None and not secrets.compare_digest(given.encode(), api_key.encode()):
        raise RequestError("this server wants an API key, and was given none or another.", status=401)


def _handle_errors(app: "FastAPI") -> None:
    """Answer what goes wrong in OpenAI's form."""
    from fastapi import Request
    from fastapi.responses import JSONResponse

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(of_error(error), error.status)

    @app.exception_handler(HfMsaeError)
    async def impossible(request: Request, error: HfMsaeError) -> JSONResponse:
        return JSONResponse(error_form(str(error), 400), 400)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def no_route(request: Request, error: Exception) -> JSONResponse:
        words = f"there is no {request.method} {request.url.path} here; there are /v1/models, /v1/completions and "
        return JSONResponse(error_form(f"{words}/v1/chat/completions.", 404), 404)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_form(FAILED, 500), 500)


def _model_form(name: str, names: Names) -> dict[str, Any]:
    """A model as `/v1/models` lists it, and what of it may be steered."""
    if name not in names:
        raise RequestError(
            f"there is no model {name!r:.80}; there are {', '.join(map(repr, names))}.",
            "model",
            status=404,
            code="model_not_found",
        )
    served, _ = names[name]
    saes = [
        {"name": key, "site": sae.config.site, "num_latents": sae.config.num_latents}
        for key, sae in served.pipe.saes.items()
    ]
    of_steering = {"saes": saes, "steerings": list(served.steerings)}
    return {"id": name, "object": "model", "created": 0, "owned_by": "hf-msae", **of_steering}


async def _read_body(request: "Request", most: int) -> Any:
    """The JSON of a request.

    Raises:
        RequestError: It is not sent as JSON, is too large, or is no JSON.
    """
    from hf_msae.modeling.untrusted import parse_json

    # Pages of other sites cannot send this without asking first, which no route here allows.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("a request is sent with Content-Type: application/json.", status=415)
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > most:
            raise RequestError(f"a request may have {most:,} bytes, and this one has more.", status=413)
    try:
        return parse_json(b"".join(parts), "the request")
    except ValueError as error:
        raise RequestError(str(error).removesuffix(" Save or download it again.")) from None


async def _stream(answer: Answer, news: AsyncIterator[News]) -> "Response":
    """The answer in pieces; what goes wrong before the first is answered as if it came whole."""
    from fastapi.responses import StreamingResponse

    events = answer.events(news)
    try:
        first = await anext(events)
    except StopAsyncIteration:
        first = DONE

    async def all_events() -> AsyncIterator[str]:
        yield first
        try:
            async for one in events:
                yield one
        except HfMsaeError as error:
            yield event(error_form(str(error), 400))
        except Exception:
            logger.exception("A text failed on the way.")
            yield event(error_form(FAILED, 500))

    return StreamingResponse(all_events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def run_server(
    served: Sequence[Served],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    api_key: str | None = None,
) -> None:
    """Serve until interrupted.

    Args:
        served: The models.
        host: The address to listen at.
        port: The port; 0 takes a free one.
        limits: What a request may ask for.
        api_key: What clients must give as theirs; None lets everybody in.

    Raises:
        InputError: The port is taken or there is no such address; or FastAPI or uvicorn is not installed.
    """
    app = build_app(served, limits, api_key=api_key)
    import uvicorn

    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"Cannot listen at {host}:{port} ({error.strerror or error}); give another --port."
        ) from error
    with listening:
        shown = f"[{host}]" if ":" in host else host
        names = ", ".join(name for one in served for name in one.names)
        print(f"Serving {names} at http://{shown}:{listening.getsockname()[1]}/v1", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE)
        uvicorn.Server(config).run(sockets=[listening])
