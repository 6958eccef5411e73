"""`/healthz`, `/readyz` and `/metrics` of a running line, on the standard library's server. The supervisor starts it and gives it the answers.

It listens on this machine alone unless told otherwise, reads no request body and holds few threads: whoever asks slowly costs himself.
"""

from __future__ import annotations

import json
import logging
import socket
import socketserver
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from edge_dkm.errors import EdgeError
from edge_dkm.service.connections import REQUEST_S, BoundedServer

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

log = logging.getLogger(__name__)
Report = tuple[bool, dict[str, Any]]


@dataclass(frozen=True)
class Answers:
    """Where the answers come from; each is called once per request, from the server's threads. `metrics`: None where they are off."""

    healthz: Callable[[], Report]
    readyz: Callable[[], Report]
    metrics: Callable[[], bytes | None] = lambda: None


class HealthServer:
    """Serves from its construction until `close`. Port 0 takes a free one; `port` says which.

    Raises:
        EdgeError: host or port cannot be used.
    """

    def __init__(self, answers: Answers, host: str = "127.0.0.1", port: int = 0) -> None:
        try:
            self._server = _Server(answers, host, port)
        except (OSError, UnicodeError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise EdgeError(
                f"health.host {host}, health.port {port} cannot be used: {reason}; give a free port and an address of this machine"
            ) from None
        self.port: int = self._server.server_address[1]
        self._server.start("http-health")

    def close(self) -> None:
        """Stops listening and closes what is open; does not wait for slow clients."""
        self._server.stop()


class _Server(BoundedServer, HTTPServer):
    def __init__(self, answers: Answers, host: str, port: int) -> None:
        self.answers = answers
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks the DNS for the host's name, which takes seconds where there is none.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "edge-dkm", ""
    timeout = REQUEST_S
    protocol_version = "HTTP/1.0"  # one request per connection: none can be held open

    def do_GET(self) -> None:
        self.server.connections.answering(self.connection)
        path = self.path.partition("?")[0]
        try:
            if path in {"/healthz", "/readyz"}:
                answers = self.server.answers
                is_ok, body = (answers.healthz if path == "/healthz" else answers.readyz)()
                self._reply(200 if is_ok else 503, {"ok": is_ok, **body})
            elif path == "/metrics" and (text := self.server.answers.metrics()) is not None:
                self._send(200, text, METRICS_TYPE)
            else:
                self._reply(404, {"ok": False, "why": "expected /healthz, /readyz or, where metrics are on, /metrics"})
        except OSError:  # the client went away
            raise
        except Exception as error:
            log.exception("%s cannot be answered", path)
            self._reply(503, {"ok": False, "why": f"{type(error).__name__} while answering"})

    def do_HEAD(self) -> None:
        self.do_GET()  # `_send` leaves the body out

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self._reply(code, {"ok": False, "why": message or explain or "not understood"})

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are no events of the line."""

    def _reply(self, code: int, body: dict[str, Any]) -> None:
        self._send(code, (json.dumps(body, default=str) + "\n").encode(), "application/json")

    def _send(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
