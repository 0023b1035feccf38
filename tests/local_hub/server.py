"""A Hub on this machine: a real HTTP server that speaks what the unmodified `huggingface_hub` client says.

Point `HF_ENDPOINT` at `LocalHub().endpoint`, set `HF_HUB_DISABLE_XET=1`, and pushes and pulls of the tests go over
HTTP: repos, preupload, large files by LFS, commits, pull requests, branches, redirects to a second origin that plays
the CDN, ranges, error codes, tokens, private and gated repos. Faults are real ones: the socket is closed in the middle
of a body, in either direction.

`LocalHub.requests` records what was asked and how many bytes of a body were sent.
"""

import contextlib
import re
import socket
import socketserver
import threading
from http.server import ThreadingHTTPServer
from typing import Any

from local_hub.handler import Fault, Request
from local_hub.routes import HubHandler
from local_hub.store import Account, Commit, File, Repo, is_large


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    hub: "LocalHub"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.connections: set[socket.socket] = set()

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the name service for this machine's full name.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.socket.getsockname()[1]

    def process_request(self, request, client_address) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""

    def close_all(self) -> None:
        """Free the port, and end what still goes on over it."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # the client may have gone first
                connection.shutdown(socket.SHUT_RDWR)


class LocalHub:
    """The server and all it holds. `token` writes as `user`, `read_token` only reads as `user`, and `stranger_token`
    writes as somebody else.

    `cdn=False` serves large files itself rather than by redirect; `ranges=False` ignores Range headers, as some
    proxies do; `page_size` is how many models a page of their list holds. Between `stop` and
    `start` connections are refused.
    """

    user = "tester"
    token, read_token, stranger_token = "hf_write", "hf_read", "hf_stranger"

    def __init__(self) -> None:
        self.accounts = {
            self.token: Account(self.user),
            self.read_token: Account(self.user, "read"),
            self.stranger_token: Account("stranger"),
        }
        self._servers: list[_Server] = []
        self._ports = [0, 0]
        self.start()
        # Large files come from another host, as on the Hub: its client takes redirects on the same host for its own.
        self.endpoint, self.cdn_endpoint = f"http://127.0.0.1:{self._ports[0]}", f"http://localhost:{self._ports[1]}"
        self.reset()

    def start(self) -> None:
        """Listen, at the same addresses as before."""
        for port in self._ports[len(self._servers) :]:
            server = _Server(("127.0.0.1", port), HubHandler)
            server.hub = self
            threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
            self._servers.append(server)
        self._ports = [server.server_port for server in self._servers]

    def stop(self) -> None:
        """Be out of reach, as where there is no network."""
        while self._servers:
            self._servers.pop().close_all()

    def reset(self) -> None:
        """An empty Hub without faults, within reach."""
        self.start()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.cdn, self.ranges, self.page_size = True, True, 1000

    def fail(self, pattern: str, **how: Any) -> Fault:
        """Add a `Fault`."""
        self.faults.append(Fault(pattern, **how))
        return self.faults[-1]

    def fault_for(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                if fault.skip == 0:
                    fault.times -= 1
                    return fault
                fault.skip -= 1
        return None

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        return self.repos[kind, repo_id]

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """The files of a repo without asking over HTTP."""
        return {path: file.content for path, file in self.repo(repo_id, kind).at(revision).files.items()}

    def put(self, repo_id: str, files: dict[str, bytes], revision: str = "main", kind: str = "model") -> Commit:
        """Commit files without asking over HTTP, into a new repo where there is none."""
        repo = self.repos.setdefault((kind, repo_id), Repo(repo_id, kind))
        added = {path: File(content, is_large(path, len(content))) for path, content in files.items()}
        self.large_files |= {file.sha256: file.content for file in added.values() if file.large}
        return repo.commit(revision, added, [], "put")[0]

    def asked(self, pattern: str = "") -> list[Request]:
        """The requests whose "METHOD /path" matches a regular expression."""
        return [request for request in self.requests if re.search(pattern, f"{request.method} {request.path}")]

    def bytes_sent(self, pattern: str = "") -> int:
        """Bytes of the bodies that answered those requests."""
        return sum(request.sent for request in self.asked(pattern))
