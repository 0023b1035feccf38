"""The page behind a port of its own, in this process, as `app.py` starts it."""

import contextlib
import http.client
import io
import json
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from msae_space.latent_index import THREAD_NAME
from msae_space.look import launch_options
from msae_space.page import build
from msae_space.settings import Settings
from patience import HANG_SECONDS


@dataclass
class Server:
    """The page that runs, and what its process said to the log."""

    port: int
    app: Any
    said: io.StringIO

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_SECONDS)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (BrokenPipeError, ConnectionResetError):  # it was refused before all of it was sent
            return connection.getresponse().status, b""
        finally:
            connection.close()

    def call(self, handler: dict[str, Any], data: list[Any], event: Any = None, query: str = "") -> dict[str, Any]:
        """What a handler answers: Gradio's message that it has completed."""
        session = uuid.uuid4().hex
        sent = {"data": data, "fn_index": handler["id"], "session_hash": session, "event_data": event}
        status, said = self.ask(
            "POST", f"/gradio_api/queue/join?{query}", json.dumps(sent).encode(), {"Content-Type": "application/json"}
        )
        if status != 200:
            return {"success": False, "output": {"error": f"{status} {said.decode()}"}}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_SECONDS)
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        answer = connection.getresponse()
        while line := answer.readline():
            if line.startswith(b"data:") and (found := json.loads(line[5:]))["msg"] == "process_completed":
                connection.close()
                return found
        raise AssertionError("the stream ended without an answer")

    @property
    def handlers(self) -> list[dict[str, Any]]:
        """All that a browser can call."""
        return [one for one in self.app.config["dependencies"] if one["backend_fn"]]

    def component(self, number: int) -> dict[str, Any]:
        return next(one for one in self.app.config["components"] if one["id"] == number)


@contextlib.contextmanager
def serving(*saes: str) -> Iterator[Server]:
    """A page of these SAEs."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        app = build(Settings(saes))
        app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **launch_options())
        try:
            yield Server(app.server_port, app, said)
        finally:
            app.close()
            for thread in threading.enumerate():
                if thread.name == THREAD_NAME:  # torch is not left in the midst of its work
                    thread.join()
