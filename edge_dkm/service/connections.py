"""The open connections of a small local server: so many and no more, none for ever. The health server and the admin socket use it.

A client that connects and says nothing costs a thread until it is overdue, or until another client needs its place.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time


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
