"""One HTTP request and its answer: bodies, ranges, counting and faults, whatever the request is about."""

import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from local_hub.store import HubError
from patience import HANG_SECONDS

CHUNK = 1 << 16


@dataclass
class Request:
    """One request as the server saw it; `sent` counts the bytes of the answer's body, `received` of the request's."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0
    received: int = 0


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" matches the regular expression `pattern`,
    after `skip` that go well.

    `status` is answered in place of the right answer; or the connection breaks after `drop_after` bytes of the body,
    of the upload where there is one, else of the download; or, with `ranges=False`, the whole file is sent; or a
    redirect to `location`, "" for the address that was asked. With `until`, all of that comes only when the event is
    set.
    """

    pattern: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    drop_after: int | None = None
    retry_after: int | None = None
    ranges: bool = True
    until: threading.Event | None = None
    location: str | None = None


class Handler(BaseHTTPRequestHandler):
    """A subclass answers, in `answer`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any

    def log_message(self, format: str, *args: object) -> None:
        """`LocalHub.requests` is the log."""

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # The request

    def handle_request(self) -> None:
        self.hub = self.server.hub
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.entry = Request(self.command, self.route, self.headers.get("Range"), token)
        self.hub.requests.append(self.entry)
        self.fault = self.hub.fault_for(f"{self.command} {self.route}")
        body = self.read_body()
        if body is None:
            return self.break_off()
        self.body = body
        if self.fault is not None and self.fault.until is not None:
            self.fault.until.wait(HANG_SECONDS)
        try:
            if self.fault is not None and self.fault.status is not None:
                raise HubError(self.fault.status, "a fault that the test asked for")
            if self.fault is not None and self.fault.location is not None:
                return self.send(302, b"", {"Location": self.fault.location or self.path})
            self.answer(url.path)
        except HubError as error:
            self.send_problem(error)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def read_body(self) -> bytes | None:
        """The request's body; None where a fault ends it halfway."""
        limit = self.fault.drop_after if self.fault is not None else None
        parts = []
        for part in self.body_parts():
            parts.append(part)
            self.entry.received += len(part)
            if limit is not None and self.entry.received >= limit:
                return None
        return b"".join(parts)

    def body_parts(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length", 0))
        while left and (part := self.rfile.read(min(left, CHUNK))):
            left -= len(part)
            yield part

    def break_off(self) -> None:
        """End the connection as a network failure does: by a reset, not in good order."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    # The answer

    def send(self, status: int, body: bytes, headers: dict[str, str | None]) -> None:
        self.entry.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.fault.drop_after if self.fault is not None else None
        view = memoryview(body)[:limit]
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            # Counted first: the client may go on, and a test look, before this thread runs again.
            self.entry.sent += len(part)
            self.wfile.write(part)
        if limit is not None:
            # In good order here, or bytes that are still under way would be lost and the test could not count.
            self.close_connection = True

    def send_json(self, value: object, status: int = 200, **headers: str) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def send_problem(self, error: HubError) -> None:
        headers = {"X-Error-Code": error.code, "X-Error-Message": error.message, "X-Repo-Commit": error.commit}
        if self.fault is not None and self.fault.retry_after is not None:
            headers["Retry-After"] = str(self.fault.retry_after)
        body = {"error": error.message, **error.body}
        self.send(error.status, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})

    def send_content(self, content: bytes, headers: dict[str, str | None]) -> None:
        """A file, or the range of it that was asked for."""
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not self.hub.ranges or (self.fault is not None and not self.fault.ranges):
            return self.send(200, content, headers)
        first, last = asked.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= stop:
            return self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self.send(206, content[start:stop], headers)

    def answer(self, quoted_path: str) -> None:
        """Send the answer to `self.command` on that path, or raise `HubError`."""
        raise NotImplementedError
