from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edge_dkm.errors import EdgeError
from edge_dkm.service import connections, http_health
from edge_dkm.service.connections import MAX_CLIENTS, Connections
from edge_dkm.service.http_health import Answers, HealthServer, Report
from tests.waiting import wait_until


class Line:
    """What the answers are taken from; a test changes it."""

    def __init__(self) -> None:
        self.stuck: list[str] = []
        self.why_not_ready: str | None = None
        self.metrics: bytes | None = b"edge_dkm_outbox_rows 3.0\n"
        self.held = threading.Event()
        self.held.set()

    def healthz(self) -> Report:
        self.held.wait(20)
        return not self.stuck, {"stuck": self.stuck}

    def readyz(self) -> Report:
        return self.why_not_ready is None, {"why": self.why_not_ready} if self.why_not_ready else {}

    def answers(self) -> Answers:
        return Answers(self.healthz, self.readyz, lambda: self.metrics)


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def server(line: Line) -> Iterator[HealthServer]:
    opened = HealthServer(line.answers())
    with contextlib.closing(opened):
        yield opened


def get(server: HealthServer, path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path)
        with connection.getresponse() as response:
            return response.status, response.read()


def connect(server: HealthServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def test_healthz_is_200_until_a_stage_is_stuck_and_says_which(server: HealthServer, line: Line) -> None:
    assert get(server, "/healthz") == (200, b'{"ok": true, "stuck": []}\n')
    line.stuck = ["infer"]
    code, body = get(server, "/healthz")
    assert (code, json.loads(body)) == (503, {"ok": False, "stuck": ["infer"]})


def test_readyz_is_503_with_the_reason_while_the_line_cannot_inspect(server: HealthServer, line: Line) -> None:
    assert get(server, "/readyz")[0] == 200
    line.why_not_ready = "no camera is online"
    code, body = get(server, "/readyz?verbose")
    assert (code, json.loads(body)["why"]) == (503, "no camera is online")


def test_metrics_are_plain_text_and_not_there_where_they_are_off(server: HealthServer, line: Line) -> None:
    assert get(server, "/metrics") == (200, b"edge_dkm_outbox_rows 3.0\n")
    line.metrics = None
    assert get(server, "/metrics")[0] == 404


def test_head_has_the_answer_without_its_body(server: HealthServer, line: Line) -> None:
    line.stuck = ["infer"]
    assert get(server, "/healthz", "HEAD") == (503, b"")


@pytest.mark.parametrize("path", ["/", "/healthz/", "/../etc/passwd", "/metrics.json"])
def test_anything_else_is_404(server: HealthServer, path: str) -> None:
    code, body = get(server, path)
    assert code == 404 and json.loads(body)["ok"] is False


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"POST /healthz HTTP/1.1\r\n\r\n",
        b"GET " + b"/" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"GET\r\n\r\n",
        b"\r\n",
    ],
    ids=["tls", "post", "long path", "many headers", "no path", "empty"],
)
def test_what_is_no_proper_request_leaves_the_server_as_it_was(
    server: HealthServer, request_bytes: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with connect(server) as client:
        client.sendall(request_bytes)
        client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while client.recv(4096):
                pass
    assert get(server, "/healthz")[0] == 200
    assert capfd.readouterr().err == ""


def test_a_client_that_breaks_off_leaves_no_traceback(
    server: HealthServer, line: Line, capfd: pytest.CaptureFixture[str]
) -> None:
    line.metrics = b"x" * 30_000_000
    for _ in range(3):
        with connect(server) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            client.recv(10)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends with a reset
    wait_until(lambda: handlers() == 0)
    assert get(server, "/healthz")[0] == 200
    assert capfd.readouterr().err == ""


def handlers() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_silent_clients_cost_few_threads_and_hold_up_nobody(server: HealthServer) -> None:
    with contextlib.ExitStack() as stack:
        for n in range(4 * MAX_CLIENTS):
            client = stack.enter_context(connect(server))
            client.sendall(b"GET /hea" if n % 2 else b"")
        for _ in range(5):
            assert get(server, "/healthz")[0] == 200
        wait_until(lambda: handlers() <= MAX_CLIENTS)


class FirstComeFirstServed(Connections):
    """As it would be without eviction."""

    def admit(self, connection: socket.socket) -> bool:
        return len(self._reading) < MAX_CLIENTS and super().admit(connection)


def test_control_without_eviction_silent_clients_do_hold_up_the_others(server: HealthServer) -> None:
    server._server.connections = FirstComeFirstServed(MAX_CLIENTS, request_s=60)
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CLIENTS):
            stack.enter_context(connect(server))
        wait_until(lambda: handlers() == MAX_CLIENTS)
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            get(server, "/healthz")


def test_a_client_that_trickles_is_cut_off(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_S", 0.3)
    with contextlib.closing(HealthServer(line.answers())) as server, connect(server) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\n")
        client.settimeout(0.02)

        def is_cut_off() -> bool:
            try:
                client.sendall(b"a")  # never silent for as long as the socket's own timeout
                return client.recv(10) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        wait_until(is_cut_off)
        assert get(server, "/healthz")[0] == 200


def test_requests_that_wait_for_an_answer_are_bounded_and_the_rest_is_turned_away(
    server: HealthServer, line: Line
) -> None:
    line.held.clear()
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(get(server, "/healthz")[0])) for _ in range(MAX_CLIENTS)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(server._server.connections._answering) == MAX_CLIENTS)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        get(server, "/readyz")
    line.held.set()
    for thread in threads:
        thread.join()
    assert codes == [200] * MAX_CLIENTS
    assert get(server, "/readyz")[0] == 200


def test_an_answer_that_cannot_be_given_is_no_good_health(server: HealthServer, line: Line) -> None:
    def fail() -> Report:
        raise ZeroDivisionError

    server._server.answers = Answers(fail, line.readyz)
    code, body = get(server, "/healthz")
    assert (code, json.loads(body)) == (503, {"ok": False, "why": "ZeroDivisionError while answering"})


def test_close_does_not_wait_for_a_silent_client(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_S", 3600.0)
    monkeypatch.setattr(http_health._Handler, "timeout", 3600.0)
    server = HealthServer(line.answers())
    with connect(server) as client:
        client.sendall(b"GET /")
        wait_until(lambda: len(server._server.connections._reading) == 1)
        server.close()
        assert client.recv(10) == b""
    with pytest.raises(ConnectionError):
        connect(server)
    wait_until(lambda: handlers() == 0)


def test_it_listens_on_this_machine_alone(server: HealthServer) -> None:
    assert server._server.server_address[0] == "127.0.0.1"


def test_a_port_that_is_taken_and_an_address_that_is_not_ours_are_named(line: Line, server: HealthServer) -> None:
    with pytest.raises(
        EdgeError, match=rf"health.host 127.0.0.1, health.port {server.port} cannot be used: Address alr"
    ):
        HealthServer(line.answers(), port=server.port)
    with pytest.raises(EdgeError, match=r"health.host 192.0.2.1, health.port 0 cannot be used"):
        HealthServer(line.answers(), host="192.0.2.1")


def test_it_serves_on_ipv6_too(line: Line) -> None:
    made: Callable[..., Any] = HealthServer
    try:
        server = made(line.answers(), host="::1")
    except EdgeError:
        pytest.skip("this machine has no IPv6")
    with contextlib.closing(server), socket.create_connection(("::1", server.port), timeout=20) as client:
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.0 200")
