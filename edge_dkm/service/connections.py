"""The open connections of a small local server: so many and no more, none for ever. The health server and the admin socket use it.

A client that connects and says nothing costs a thread until it is overdue, or until another client needs its place.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import threading
import time
from typing import Any

MAX_CLIENTS = 8
REQUEST_S = 5.0  # to send the whole request, and to take the answer
POLL_S = 0.1

log = logging.getLogger(__name__)


class Connections:
    """At most `limit` at a time; one whose request is not read within `request_s` is closed by `expire`."""

    def __init__(self, limit: int, request_s: float) -> None:
        self._limit, self._request_s = limit, request_s
        self._lock = threading.Lock()
        self._reading: dict[socket.socket, float] = {}  # since when, oldest first
        self._answering: set[socket.socket] = set()

    def admit(self, connection: socket.socket) -> bool:
        """Takes it up, at the cost of the one that has been silent longest. False where all places are held by requests under way."""
        with self._lock:
            if len(self._reading) + len(self._answering) >= self._limit:
                if not self._reading:
                    return False
                self._drop(next(iter(self._reading)))
            self._reading[connection] = time.monotonic()
            return True

    def answering(self, connection: socket.socket) -> None:
        """Its request is read; from now on it takes the time that the answer takes."""
        with self._lock:
            if self._reading.pop(connection, None) is not None:
                self._answering.add(connection)

    def forget(self, connection: socket.socket) -> None:
        """It is over."""
        with self._lock:
            self._reading.pop(connection, None)
            self._answering.discard(connection)

    def expire(self) -> None:
        """Closes those whose request is overdue; to be called now and then."""
        with self._lock:
            now_s = time.monotonic()
            for connection in [c for c, since_s in self._reading.items() if now_s - since_s > self._request_s]:
                self._drop(connection)

    def close(self) -> None:
        """Closes all."""
        with self._lock:
            for connection in [*self._reading, *self._answering]:
                self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._reading.pop(connection, None)
        self._answering.discard(connection)
        # Its thread wakes up at the end of the stream and closes it; closing it here would free the number under that thread's feet.
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


class BoundedServer(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """To stand before a server of the standard library: a thread per client, MAX_CLIENTS of them, none for ever."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, address: Any, handler: type[socketserver.BaseRequestHandler]) -> None:
        self.connections = Connections(MAX_CLIENTS, REQUEST_S)
        super().__init__(address, handler)

    def start(self, name: str) -> None:
        """Serves in a thread of that name until `stop`."""
        self._thread = threading.Thread(target=self.serve_forever, args=(POLL_S,), name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops listening and closes what is open; does not wait for slow clients."""
        self.shutdown()
        self._thread.join()
        self.server_close()
        self.connections.close()

    def turn_away(self, request: Any) -> None:
        """What a client is told that finds all places taken; must not block."""

    def service_actions(self) -> None:
        self.connections.expire()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.connections.admit(request):
            super().process_request(request, client_address)
            return
        self.turn_away(request)
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        self.connections.forget(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes away in mid-sentence is no event; the standard library would print a traceback.
        log.debug("a client of %s went away", type(self).__name__, exc_info=True)
