"""A real Mosquitto on localhost and a subscriber: what broker tests and measurements share."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from edge_dkm.mqtt.embedded_broker import find_mosquitto
from edge_dkm.mqtt.link import await_connack, open_link, pump
from edge_dkm.settings import MqttSettings
from tests.waiting import wait_until

needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="Mosquitto is not installed")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Mosquitto:
    """A broker that can be stopped, killed and started again on the same port."""

    def __init__(self, folder: Path, extra: str = "allow_anonymous true\n") -> None:
        self.port, self._folder, self._extra = free_port(), folder, extra
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        path = find_mosquitto()
        assert path is not None
        config = self._folder / f"mosquitto-{self.port}.conf"
        # As root Mosquitto would become a user who may not read pytest's folders.
        user = "user root\n" if os.geteuid() == 0 else ""
        config.write_text(f"{user}listener {self.port} 127.0.0.1\npersistence false\n{self._extra}")
        with (self._folder / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen([path, "-c", str(config)], stdout=log, stderr=log)
        wait_until(self._accepts)

    def kill(self) -> None:
        """As `kill -9`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Connections stay open and nothing answers."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Goes on as if nothing had been."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def _accepts(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=0.5):
                return True
        except OSError:
            return False


class Subscriber:
    """Collects every message below a topic on its own connection, in order of arrival."""

    def __init__(self, port: int, topic: str = "#") -> None:
        self.settings = MqttSettings(host="127.0.0.1", port=port)
        self.messages: list[tuple[str, dict[str, Any], bool]] = []
        self._topic, self._stop, self._ready = topic, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(20)

    def _run(self) -> None:
        link = open_link(self.settings, f"test-{id(self)}", clean=True)
        await_connack(link, self.settings)
        granted = threading.Event()
        link.client.on_subscribe = lambda *_: granted.set()
        link.client.subscribe(self._topic, qos=1)
        while not self._stop.is_set() and link.lost is None:
            pump(link, 0.05)
            if granted.is_set():
                self._ready.set()
            messages, link.messages = link.messages, []
            self.messages += [(m.topic, json.loads(m.payload), bool(m.retain)) for m in messages]
        link.client.disconnect()

    def of(self, schema: str) -> list[dict[str, Any]]:
        """Payloads of one schema, in order."""
        return [payload for _, payload, _ in list(self.messages) if payload.get("schema") == schema]

    def results(self) -> list[dict[str, Any]]:
        """First copies of results."""
        return list({m["result_id"]: m for m in reversed(self.of("dkm.result/1"))}.values())[::-1]

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10)
