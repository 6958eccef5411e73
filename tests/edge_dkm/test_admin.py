from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_dkm.errors import EdgeError, StorageError, UsageError
from edge_dkm.service import connections
from edge_dkm.service.admin import MAX_PATH_BYTES, MAX_REQUEST_BYTES, SOCKET, AdminServer, Handler
from edge_dkm.service.admin_client import ask, outbox_text, purge_text, replay_text, status_text
from edge_dkm.service.connections import MAX_CLIENTS
from tests.waiting import wait_until


def refuse(args: dict[str, Any]) -> dict[str, Any]:
    raise UsageError(f"camera {args['camera']} is not known")


def crash(args: dict[str, Any]) -> dict[str, Any]:
    raise ZeroDivisionError("secret detail")


HANDLERS: dict[str, Handler] = {"echo": lambda args: {"args": args}, "refuse": refuse, "crash": crash}


@pytest.fixture
def station(tmp_path: Path) -> Iterator[AdminServer]:
    with contextlib.closing(AdminServer(tmp_path / SOCKET, HANDLERS)) as server:
        yield server


def raw(path: Path, data: bytes) -> dict[str, Any]:
    """What the station answers to these bytes."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(path))
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as file:
            answer: dict[str, Any] = json.loads(file.readline())
            return answer


def test_a_request_is_answered_with_what_the_handler_says(station: AdminServer) -> None:
    assert ask(station.path.parent, "echo", {"camera": "Käfer", "from": 3}) == {"args": {"camera": "Käfer", "from": 3}}
    assert ask(station.path.parent, "echo") == {"args": {}}


def test_the_socket_is_private(station: AdminServer) -> None:
    mode = station.path.stat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600


def test_a_refusal_reaches_the_client_with_its_exit_code(station: AdminServer) -> None:
    with pytest.raises(EdgeError, match="camera side is not known") as caught:
        ask(station.path.parent, "refuse", {"camera": "side"})
    assert caught.value.exit_code == 2 and EdgeError.exit_code == 1


def test_a_handler_that_fails_says_no_more_than_that(station: AdminServer) -> None:
    with pytest.raises(EdgeError, match="internal error: ZeroDivisionError") as caught:
        ask(station.path.parent, "crash")
    assert "secret" not in str(caught.value)
    assert ask(station.path.parent, "echo") == {"args": {}}


def test_an_unknown_verb_is_refused_with_the_known_ones(station: AdminServer) -> None:
    with pytest.raises(EdgeError, match="'format' is not known here, expected echo, refuse, crash"):
        ask(station.path.parent, "format")


@pytest.mark.parametrize(
    "data",
    [
        b"\n",
        b"hello\n",
        b"\xff\xfe\n",
        b"[" * 30000 + b"\n",
        b"[]\n",
        b'{"verb": 1}\n',
        b'{"verb": "echo", "args": []}\n',
        b'{"verb": "echo", "args": "' + b"x" * MAX_REQUEST_BYTES + b'"}\n',
    ],
)
def test_what_is_no_request_is_refused_and_hurts_nothing(station: AdminServer, data: bytes) -> None:
    answer = raw(station.path, data)
    assert (answer["ok"], answer["exit_code"]) == (False, 2)
    assert ask(station.path.parent, "echo") == {"args": {}}


def handlers() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_clients_that_hang_hurt_nobody(station: AdminServer) -> None:
    with contextlib.ExitStack() as stack:
        for n in range(3 * MAX_CLIENTS):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(station.path))
            client.sendall(b'{"verb"' if n % 2 else b"")
            if n % 5 == 0:
                assert ask(station.path.parent, "echo") == {"args": {}}
        wait_until(lambda: handlers() <= MAX_CLIENTS)


def test_a_client_that_says_nothing_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_S", 0.2)
    server = AdminServer(tmp_path / SOCKET, HANDLERS)
    with contextlib.closing(server), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(server.path))
        assert client.recv(10) == b""


def test_more_requests_under_way_than_places_are_told_so(tmp_path: Path) -> None:
    released = threading.Event()

    def hold(args: dict[str, Any]) -> dict[str, Any]:
        released.wait(20)
        return {}

    with contextlib.closing(AdminServer(tmp_path / SOCKET, {"hold": hold})) as server:
        threads = [threading.Thread(target=ask, args=(tmp_path, "hold", None, 20)) for _ in range(MAX_CLIENTS)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(server._server.connections._answering) == MAX_CLIENTS)
        try:
            with pytest.raises(EdgeError, match="busy"):
                ask(tmp_path, "hold")
        finally:
            released.set()
            for thread in threads:
                thread.join()


def test_no_station_is_said_with_what_to_do(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(EdgeError, match=rf"no station runs on state folder {folder}.*start it with edge-dkm run"):
            ask(folder, "status")


def test_the_socket_goes_with_the_station_and_a_second_one_may_follow(tmp_path: Path) -> None:
    AdminServer(tmp_path / SOCKET, HANDLERS).close()
    assert list(tmp_path.iterdir()) == []
    with contextlib.closing(AdminServer(tmp_path / SOCKET, HANDLERS)):
        assert ask(tmp_path, "echo") == {"args": {}}


def test_what_a_killed_station_left_is_no_station_and_is_replaced(tmp_path: Path) -> None:
    program = f"""
import threading
from pathlib import Path
from edge_dkm.service.admin import AdminServer
AdminServer(Path({str(tmp_path)!r}) / "admin.sock", {{}})
print("up", flush=True)
threading.Event().wait()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "up\n"
        os.kill(child.pid, signal.SIGKILL)
    assert (tmp_path / SOCKET).exists()
    with pytest.raises(EdgeError, match="no station runs"):
        ask(tmp_path, "status")
    with contextlib.closing(AdminServer(tmp_path / SOCKET, HANDLERS)):
        assert ask(tmp_path, "echo") == {"args": {}}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_something_else_in_its_place_is_moved_aside(tmp_path: Path, kind: str) -> None:
    path = tmp_path / SOCKET
    path.mkdir() if kind == "folder" else path.write_text("x")
    with contextlib.closing(AdminServer(path, HANDLERS)):
        assert ask(tmp_path, "echo") == {"args": {}}
    assert (tmp_path / f"{SOCKET}.corrupt-1").exists()


@pytest.mark.parametrize("extra", [0, 1, 100])
def test_a_path_longer_than_a_socket_address_works_all_the_same(tmp_path: Path, extra: int) -> None:
    folder = tmp_path
    while len(os.fsencode(folder / SOCKET)) < MAX_PATH_BYTES + extra:
        missing = MAX_PATH_BYTES + extra - len(os.fsencode(folder / SOCKET))
        folder /= "d" * max(1, min(missing - 1, 50))
    folder.mkdir(parents=True)
    with contextlib.closing(AdminServer(folder / SOCKET, HANDLERS)):
        assert (folder / SOCKET).is_socket() and stat.S_IMODE((folder / SOCKET).stat().st_mode) == 0o600
        assert ask(folder, "echo") == {"args": {}}
    assert not (folder / SOCKET).exists()


def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="admin socket .*none/admin.sock cannot be made: No such file"):
        AdminServer(tmp_path / "none" / SOCKET, HANDLERS)


def test_a_station_that_does_not_answer_is_said_after_the_time_given(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / SOCKET))
        listening.listen()
        with pytest.raises(EdgeError, match=r"did not answer status within 0.1 s"):
            ask(tmp_path, "status", timeout_s=0.1)


@pytest.mark.parametrize("answer", [b"", b"hello\n", b"[]\n", b'{"ok": true}\n'])
def test_an_answer_that_is_none_is_said_as_it_is(tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / SOCKET))
        listening.listen()

        def speak() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

        thread = threading.Thread(target=speak)
        thread.start()
        with pytest.raises(EdgeError, match="expected one line of JSON"):
            ask(tmp_path, "status")
        thread.join()


def test_an_outbox_is_shown_in_lines() -> None:
    status = {
        "rows": 120,
        "bytes": 61_440,
        "oldest_s": 90.4,
        "sent_rows": 7,
        "mode": "journal",
        "epoch": "9f1c",
        "is_blocked": False,
    }
    status |= {"dropped": {"top": {"drop_oldest": 3, "age": 0}}, "last": {"top": 127}}
    assert outbox_text(status).splitlines() == [
        "outbox    120 results wait for delivery (61.4 kB), the oldest for 90 s",
        "kept      7 delivered results, for replay",
        "dropped   top: 3 by drop_oldest, declared as gaps",
        "last      top: cseq 127",
        "epoch     9f1c",
        "mode      journal",
    ]
    assert outbox_text({"rows": 0}) == "outbox    everything delivered"


def test_replay_and_purge_say_what_they_did_and_what_not() -> None:
    assert replay_text({"camera": "top", "from": 1, "to": 9, "sent": 7, "missing": 2}).splitlines() == [
        "replay    top: cseq 1 to 9, 7 results go out again, marked historical",
        "missing   2 are no longer kept; a gap record says which",
    ]
    assert purge_text({"rows": 12, "left": 3}).splitlines() == [
        "purge     12 delivered results deleted; they cannot be replayed any more",
        "left      3 results wait for delivery and stay",
    ]


def test_a_station_is_shown_with_what_needs_a_word() -> None:
    status = {
        "station": "st1",
        "state": {"state": "degraded", "code": "C-LOST", "detail": "top"},
        "uptime_s": 7300,
        "ready": False,
        "why": "no camera is online",
        "broker": "M-OFFLINE connection refused",
        "alarms": [{"code": "C-LOST", "since": "2026-11-20T23:44:01Z", "detail": "camera top gives no frames"}],
        "cameras": {"top": {"state": "offline", "code": "C-LOST", "fps": 0.0}},
        "counters": {"top": {"frames": 9, "results": 7, "bad": 1, "dropped": {"superseded": 1}}},
        "stages": {
            "infer": {"state": "ok", "count": 1, "age_s": 0.1},
            "cam:top": {"state": "degraded", "count": 1, "age_s": 31},
        },
        "restarts": {"cam:top": 2, "process": 1},
        "outbox": {"rows": 0},
        "disk_free_mb": 900,
        "clock_synced": False,
    }
    assert status_text(status).splitlines() == [
        "station   st1 degraded (C-LOST: top), up 2 h",
        "ready     no: no camera is online",
        "broker    M-OFFLINE connection refused",
        "alarm     C-LOST camera top gives no frames",
        "camera    top: offline C-LOST, 0.0 fps, 7 results, 1 bad frames, 1 skipped",
        "stage     cam:top: degraded, last progress 31 s ago, restarted 2 times so far",
        "stage     process: restarted 1 times so far",
        "outbox    everything delivered",
        "machine   900 MB disk free, the clock is not synchronised",
    ]
    assert status_text({"station": "st1"}) == "station   st1 running"


def test_an_alarm_whose_detail_names_its_own_code_is_shown_with_one() -> None:
    alarms = [
        {"code": "M-NO-ACK", "detail": "M-NO-ACK no consumer acknowledges"},
        {"code": "C-OFFLINE", "detail": "C-LOST camera top gives no frames"},
        {"code": "X"},
    ]
    shown = [line for line in status_text({"alarms": alarms}).splitlines() if line.startswith("alarm")]
    assert shown == [
        "alarm     M-NO-ACK no consumer acknowledges",
        "alarm     C-OFFLINE C-LOST camera top gives no frames",
        "alarm     X",
    ]
