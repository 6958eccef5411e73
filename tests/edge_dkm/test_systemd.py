from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_dkm.service.systemd import Notifier


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """What systemd listens on, and what it would put into $NOTIFY_SOCKET."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@edge-dkm-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as opened:
        opened.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        opened.settimeout(5)
        yield opened, name


def test_each_word_is_one_datagram(listener: tuple[socket.socket, str]) -> None:
    opened, name = listener
    notifier = Notifier({"NOTIFY_SOCKET": name})
    assert notifier.is_there
    notifier.ready()
    notifier.watchdog()
    notifier.status("running,\n 3 cameras")
    notifier.extend_start(120)
    notifier.stopping()
    assert [opened.recv(1000) for _ in range(5)] == [
        b"READY=1",
        b"WATCHDOG=1",
        b"STATUS=running, 3 cameras",
        b"EXTEND_TIMEOUT_USEC=120000000",
        b"STOPPING=1",
    ]


def test_a_line_end_in_the_status_cannot_say_anything_else(listener: tuple[socket.socket, str]) -> None:
    opened, name = listener
    Notifier({"NOTIFY_SOCKET": name}).status("camera top: \nREADY=1\nMAINPID=1")
    assert opened.recv(1000) == b"STATUS=camera top: READY=1 MAINPID=1"


def test_without_systemd_nothing_happens() -> None:
    notifier = Notifier({})
    notifier.ready()
    notifier.watchdog()
    notifier.stopping()
    assert not notifier.is_there and notifier.ping_every_s is None


def test_the_watchdog_is_due_at_a_third_of_its_interval_but_every_ten_seconds_at_least() -> None:
    def due(microseconds: str, **more: str) -> float | None:
        return Notifier({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": microseconds, **more}).ping_every_s

    assert due("30000000") == 10
    assert due("6000000", WATCHDOG_PID=str(os.getpid())) == 2
    assert due("600000000") == 10
    assert [due("0"), due("soon"), due("-5")] == [None, None, None]


def test_an_inherited_watchdog_of_another_process_is_not_answered() -> None:
    environment = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getppid())}
    assert Notifier(environment).ping_every_s is None
    del environment["WATCHDOG_PID"]  # control
    assert Notifier(environment).ping_every_s == 10


def test_a_socket_that_is_gone_is_said_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    for _ in range(3):
        notifier.watchdog()
    assert [record.message for record in caplog.records] == [
        "systemd does not take WATCHDOG: No such file or directory"
    ]
