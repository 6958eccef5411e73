from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs import load_text
from edge_dkm.errors import BrokerError
from edge_dkm.mqtt import embedded_broker
from edge_dkm.mqtt.embedded_broker import EmbeddedBroker
from edge_dkm.mqtt.link import await_connack, open_link, publish, pump
from edge_dkm.settings import LineSettings
from edge_dkm.watch import watch
from tests.broker import Mosquitto, Subscriber, free_port, needs_mosquitto
from tests.waiting import wait_until

LINE = "station: st1\nmodel: m\ncameras: {{top: {{source: x}}}}\nmqtt: {{host: embedded, port: {port}}}"
START = """
import sys
from pathlib import Path
from edge_dkm.mqtt.embedded_broker import EmbeddedBroker
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


@pytest.mark.broker
@needs_mosquitto
def test_a_watcher_that_is_slower_than_its_line_ends_with_it_and_without_an_error(tmp_path: Path) -> None:
    port = free_port()
    settings = load_text(LineSettings, LINE.format(port=port), "line.yaml")
    broker = EmbeddedBroker(port, tmp_path)
    shown: list[str] = []
    first = threading.Event()

    def show(topic: str, payload: bytes) -> bool:
        shown.append(topic)
        first.set()
        time.sleep(0.02)  # a slow terminal: the broker holds back what is beyond 20 unacknowledged messages
        return True

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch, settings, show, 20.0)
        link = open_link(settings.mqtt, "line", clean=True)
        await_connack(link, settings.mqtt)

        def says(topic: str) -> None:
            mid = publish(link, f"dkm/v1/st1/{topic}", b'{"state":"stopped"}', qos=1)
            while mid in link.unacknowledged:
                pump(link, 0.1)

        wait_until(lambda: says("top/result") or first.wait(0.05))
        for _ in range(100):
            says("top/result")
        says("status")
        link.client.disconnect()
        broker.close()
        assert watching.result(30) is None
    assert not shown[-1].endswith("/status")  # what tells the end of a line was lost with the broker


@pytest.mark.broker
def test_control_a_broker_of_its_own_that_goes_away_is_an_error(
    start_broker: Callable[..., Mosquitto], tmp_path: Path
) -> None:
    running = start_broker()
    text = LINE.format(port=running.port).replace("embedded", "127.0.0.1")
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch, load_text(LineSettings, text, "line.yaml"), lambda topic, payload: True, 20.0)
        wait_until(lambda: "edge-dkm-watch" in (tmp_path / "mosquitto.log").read_text())
        running.kill()
        with pytest.raises(BrokerError, match="closed the connection"):
            watching.result(30)


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
