"""A TCP proxy on localhost that does to a connection what networks do; its fault is switched while it runs.

Two threads per connection copy bytes, one each way, and look at the fault before every chunk. Bytes that a fault has swallowed are
gone: that connection stays silent after `heal`, as a real half-open one does.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

CHUNK_BYTES = 65536
LINGER_NOT = struct.pack("ii", 1, 0)  # close() then sends RST instead of FIN


@dataclass(frozen=True)
class Fault:
    """What is wrong, all of it at once; the default is nothing. `up` is from the client to the server, `down` the way back."""

    latency_s: float = 0.0
    bytes_per_s: float | None = None
    slice_bytes: int | None = None  # hand over in pieces of this size
    limit_bytes: int | None = None  # cut the connection after so many, both ways together
    first_answer_s: float = 0.0  # hold back the server's first bytes: CONNACK, for MQTT
    slow_close_s: float = 0.0  # tell of an end only after this
    silent: bool = False  # accept, and never say anything (`timeout`)
    swallow_up: bool = False  # half-open: the socket stays, the bytes do not arrive
    swallow_down: bool = False


PASS = Fault()
HALF_OPEN = Fault(swallow_up=True, swallow_down=True)


class _Connection:
    """One client and, unless the fault is silence, its server."""

    def __init__(self, client: socket.socket, server: socket.socket | None) -> None:
        self.client, self.server = client, server
        self.counted = 0
        self.answered = False
        self.swallowed: set[socket.socket] = set()  # sources whose bytes were lost: nothing of them may pass any more
        self.closed = threading.Event()
        self._lock = threading.Lock()

    def close(self, reset: bool = False) -> None:
        """Ends both sides, with RST where asked; only the first call counts."""
        with self._lock:
            if self.closed.is_set():
                return
            self.closed.set()
        for end in (self.client, self.server):
            if end is not None:
                with contextlib.suppress(OSError):
                    if reset:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
                    # Also wakes the thread in recv, without which close would not take effect.
                    end.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
                end.close()


class Proxy:
    """Listens on `port` and forwards to `target_port` of this machine. A context manager; `close` ends every thread."""

    def __init__(self, target_port: int) -> None:
        self.target_port, self.fault = target_port, PASS
        self.accepted = 0
        self.answered_bytes = 0  # handed to clients, over all connections
        self._connections: set[_Connection] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._serve()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set(self, fault: Fault) -> None:
        """From now on, for connections that are there as well."""
        self.fault = fault

    def heal(self) -> None:
        """No fault any more, and the port is open."""
        self.fault = PASS
        self.up()

    def down(self) -> None:
        """Refuses new connections and cuts those that are there."""
        with self._lock:
            listener, self._listener = self._listener, socket.socket()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        listener.close()
        self._listener.close()
        self.cut()

    def up(self) -> None:
        """Listens again after `down`."""
        if self._listener.fileno() < 0:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self._serve()

    def cut(self) -> None:
        """Ends every connection politely (FIN)."""
        self._end_all(reset=False)

    def reset_peer(self) -> None:
        """Ends every connection with RST."""
        self._end_all(reset=True)

    def close(self) -> None:
        """Ends everything and waits for the threads."""
        self.fault = PASS
        if self._listener.fileno() >= 0:
            self.down()
        for thread in list(self._threads):
            while thread.is_alive():
                self.cut()  # again: one may have been accepted meanwhile
                thread.join(0.2)

    def _end_all(self, reset: bool) -> None:
        with self._lock:
            connections, self._connections = self._connections, set()
        for connection in connections:
            connection.close(reset)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="proxy", daemon=True)
        with self._lock:
            self._threads = [other for other in self._threads if other.is_alive()] + [thread]
            thread.start()

    def _serve(self) -> None:
        self._start(self._accept_all, self._listener)

    def _accept_all(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            server = None
            if not self.fault.silent:
                try:
                    server = socket.create_connection(("127.0.0.1", self.target_port), timeout=5)
                except OSError:
                    client.close()
                    continue
                server.settimeout(None)
            for end in (client, server):
                if end is not None:
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(client, server)
            with self._lock:
                self._connections.add(connection)
            self._start(self._copy, connection, client, server)
            if server is not None:
                self._start(self._copy, connection, server, client)

    def _copy(self, connection: _Connection, source: socket.socket, sink: socket.socket | None) -> None:
        is_up = source is connection.client
        try:
            while data := source.recv(CHUNK_BYTES):
                fault = self.fault
                if sink is None or fault.silent or (fault.swallow_up if is_up else fault.swallow_down):
                    connection.swallowed.add(source)
                if source not in connection.swallowed and sink is not None:
                    self._hand_over(connection, data, sink, fault)
        except OSError:
            pass
        fault = self.fault
        if fault.slow_close_s:
            connection.closed.wait(fault.slow_close_s)
        while self.fault.silent or self.fault.swallow_up or self.fault.swallow_down:
            if connection.closed.wait(0.02):  # the news of the end is swallowed as well
                return
        with self._lock:
            self._connections.discard(connection)
        connection.close()

    def _hand_over(self, connection: _Connection, data: bytes, sink: socket.socket, fault: Fault) -> None:
        if sink is connection.client and not connection.answered:
            connection.answered = True
            connection.closed.wait(fault.first_answer_s)
        if fault.latency_s:
            connection.closed.wait(fault.latency_s)
        size = fault.slice_bytes or len(data)
        if fault.bytes_per_s:
            size = min(size, max(1, int(fault.bytes_per_s / 50)))
        for at in range(0, len(data), size):
            piece = data[at : at + size]
            if fault.limit_bytes is not None:
                piece = piece[: max(0, fault.limit_bytes - connection.counted)]
            started_s = time.monotonic()
            sink.sendall(piece)
            connection.counted += len(piece)
            self.answered_bytes += len(piece) if sink is connection.client else 0
            if fault.limit_bytes is not None and connection.counted >= fault.limit_bytes:
                raise ConnectionAbortedError("the limit is reached")
            if fault.bytes_per_s:
                connection.closed.wait(max(0.0, len(piece) / fault.bytes_per_s - (time.monotonic() - started_s)))
