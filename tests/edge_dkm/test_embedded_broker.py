from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_dkm import embedded_broker
from edge_dkm.embedded_broker import EmbeddedBroker
from edge_dkm.errors import BrokerError
from edge_dkm.settings import LineSettings
from tests.broker import Subscriber, free_port, needs_mosquitto
from tests.waiting import wait_until

START = """
import sys
from pathlib import Path
from edge_dkm.embedded_broker import EmbeddedBroker
broker = EmbeddedBroker(int(sys.argv[1]), Path(sys.argv[2]))
print("started", flush=True)
sys.stdin.read()
"""


@pytest.mark.broker
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
@needs_mosquitto
def test_the_broker_ends_with_the_line_even_when_that_is_killed(kill: signal.Signals, tmp_path: Path) -> None:
    port = free_port()
    line = subprocess.Popen(
        [sys.executable, "-c", START, str(port), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert line.stdout is not None and line.stdout.readline() == "started\n"
    assert embedded_broker._accepts(port)
    line.send_signal(kill)
    line.communicate()
    wait_until(lambda: not embedded_broker._accepts(port))


@pytest.mark.broker
@needs_mosquitto
def test_ctrl_c_reaches_the_line_and_not_its_broker(tmp_path: Path) -> None:
    broker = EmbeddedBroker(free_port(), tmp_path)
    try:
        assert os.getpgid(broker._process.pid) != os.getpgid(0)
    finally:
        broker.close()


def test_without_mosquitto_amqtt_carries_the_results(
    monkeypatch: pytest.MonkeyPatch,
    make_line: Callable[..., LineSettings],
    subscribe: Callable[..., Subscriber],
    tmp_path: Path,
) -> None:
    from edge_dkm.supervisor import run_line

    monkeypatch.setattr(embedded_broker, "find_mosquitto", lambda: None)
    port = free_port()
    report = run_line(make_line(port, mqtt=f"{{host: embedded, port: {port}}}"))
    assert (report.parts, report.unsent) == (12, 0)


def test_without_any_broker_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded_broker, "find_mosquitto", lambda: None)
    monkeypatch.setattr(embedded_broker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BrokerError, match=r"neither Mosquitto \(apt install mosquitto\) nor amqtt"):
        EmbeddedBroker(free_port(), tmp_path)
