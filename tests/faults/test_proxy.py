from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import HALF_OPEN, Fault, Proxy
from tests.waiting import wait_until


class Echo:
    """A server that sends back what it gets, and remembers how much that was."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        self.pieces: list[int] = []
        self.ended = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                self.pieces.append(len(data))
                connection.sendall(data)
        self.ended.set()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as running:
        yield running


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with connect(proxy) as sock:
        yield sock


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (piece := sock.recv(count - len(data))):
        data += piece
    return data


def says(sock: socket.socket, text: bytes) -> float:
    """Seconds for a text to come back."""
    started_s = time.monotonic()
    sock.sendall(text)
    assert receive(sock, len(text)) == text
    return time.monotonic() - started_s


def is_silent(sock: socket.socket) -> bool:
    sock.settimeout(0.3)
    try:
        sock.sendall(b"hello")
        return sock.recv(10) == b"never"
    except TimeoutError:
        return True
    finally:
        sock.settimeout(5)


def test_without_a_fault_bytes_pass_unchanged(client: socket.socket) -> None:
    text = bytes(range(256)) * 4000
    threading.Thread(target=client.sendall, args=(text,), daemon=True).start()
    assert receive(client, len(text)) == text


def test_down_refuses_and_cuts_and_up_lets_in_again(proxy: Proxy, client: socket.socket) -> None:
    says(client, b"one")
    proxy.down()
    assert client.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.heal()
    with connect(proxy) as second:
        says(second, b"two")


def test_latency_delays_each_way(proxy: Proxy, client: socket.socket) -> None:
    proxy.set(Fault(latency_s=0.1))
    assert says(client, b"hello") >= 0.2


def test_bandwidth_is_limited(proxy: Proxy, client: socket.socket) -> None:
    proxy.set(Fault(bytes_per_s=20_000))
    assert says(client, b"x" * 4000) >= 0.15


def test_the_slicer_hands_over_in_pieces(proxy: Proxy, client: socket.socket, echo: Echo) -> None:
    proxy.set(Fault(slice_bytes=3, bytes_per_s=1000))
    says(client, b"x" * 30)
    assert max(echo.pieces) <= 6 and len(echo.pieces) >= 5


def test_limit_data_cuts_after_so_many_bytes(proxy: Proxy, client: socket.socket, echo: Echo) -> None:
    proxy.set(Fault(limit_bytes=10))
    client.sendall(b"x" * 100)
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(100):  # what got through may be echoed before the cut
            received += len(piece)
    assert received <= 10
    wait_until(lambda: sum(echo.pieces) == 10)


def test_reset_peer_is_seen_as_a_reset(proxy: Proxy, client: socket.socket) -> None:
    says(client, b"one")
    proxy.reset_peer()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_timeout_accepts_and_says_nothing(proxy: Proxy) -> None:
    proxy.set(Fault(silent=True))
    with connect(proxy) as sock:
        assert is_silent(sock)


def test_half_open_swallows_both_ways_while_the_sockets_stay(proxy: Proxy, client: socket.socket, echo: Echo) -> None:
    says(client, b"one")
    proxy.set(HALF_OPEN)
    assert is_silent(client) and sum(echo.pieces) == 3
    proxy.heal()
    assert is_silent(client)  # what was swallowed is gone, so this connection can never be right again
    with connect(proxy) as second:
        says(second, b"two")


def test_half_open_one_way_still_delivers_the_other(proxy: Proxy, client: socket.socket, echo: Echo) -> None:
    says(client, b"one")
    proxy.set(Fault(swallow_down=True))
    assert is_silent(client)
    wait_until(lambda: sum(echo.pieces) == 8)


def test_the_first_answer_alone_is_held_back(proxy: Proxy) -> None:
    proxy.set(Fault(first_answer_s=0.5))
    with connect(proxy) as sock:
        first, *later = [says(sock, b"x") for _ in range(4)]
    assert first >= 0.5 > min(later)


def test_a_slow_close_tells_of_the_end_late(proxy: Proxy, echo: Echo) -> None:
    proxy.set(Fault(slow_close_s=0.3))
    with connect(proxy) as sock:
        says(sock, b"one")
        started_s = time.monotonic()
    assert echo.ended.wait(5) and time.monotonic() - started_s >= 0.25


def test_closing_leaves_no_thread_and_no_connection(echo: Echo) -> None:
    proxy = Proxy(echo.port)
    socks = [connect(proxy) for _ in range(5)]
    for sock in socks:
        says(sock, b"x")
    proxy.set(HALF_OPEN)
    proxy.close()
    for sock in socks:
        sock.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "proxy"]
