"""The station of the chaos run, a process that may die at any moment: outbox, publisher and one producer thread per camera.

Each producer writes into its ledger what it intends before the commit, and the numbers after it has returned. What must survive the
process (how many results each camera has begun) lies in memory shared with the parent.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import MutableSequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from configs import load_text
from edge_dkm.clock import rfc3339, utc_now
from edge_dkm.message import Health
from edge_dkm.mqtt import delivery
from edge_dkm.mqtt import publisher as publisher_module
from edge_dkm.mqtt.delivery import Replay
from edge_dkm.mqtt.publisher import Publisher
from edge_dkm.outbox import Limits, Outbox
from edge_dkm.outbox.row import Draft, Numbers
from edge_dkm.settings import LineSettings
from tests.faults.oracle import body_crc

CAMERAS = ("top", "side", "front", "back")
BASE = "dkm/v1/chaos"
ROWS, HEALTH_EVERY_S = -1, 0.5  # the last place of the shared memory: rows that wait in the outbox
BODY_BYTES = 350


@dataclass(frozen=True)
class StationPlan:
    """`run` counts the starts. `quick`: shorter pauses than shipped ones, for the short form. `naive`: the MQTT library's own queue."""

    folder: Path
    port: int
    mode: str
    per_camera: int
    rate_hz: float  # per camera
    run: int = 0
    quick: bool = False
    naive: bool = False
    delivery: str = ""  # further keys of that section, as `, order: live_first`

    def settings(self) -> LineSettings:
        """Of the line."""
        text = (
            f"station: chaos\nmodel: none.onnx\ncameras: {{{', '.join(f'{name}: {{source: none}}' for name in CAMERAS)}}}\n"
            f"mqtt: {{host: 127.0.0.1, port: {self.port}, keepalive_s: 5}}\nstate: {self.folder}\n"
            f"delivery: {{mode: {self.mode}{self.delivery}}}"
        )
        return load_text(LineSettings, text, "chaos")


def payload(camera: str, n: int, numbers: Numbers) -> bytes:
    """A result of a usual size."""
    body = {
        "schema": "dkm.result/1",
        "result_id": f"{camera}-{n}",
        "epoch": numbers.epoch,
        "seq": numbers.seq,
        "cseq": numbers.cseq,
        "boot_id": "chaos",
        "ts": rfc3339(utc_now()),
        "station": "chaos",
        "camera": camera,
        "state": "completed",
        "trigger": {"kind": "free", "id": n},
        "verdict": "pass",
        "reason": "default",
        "historical": False,
        "made_s": time.monotonic(),  # one clock for all processes
        "filler": "",
    }
    body["filler"] = "x" * (BODY_BYTES - len(json.dumps(body)))
    return json.dumps(body, separators=(",", ":")).encode()


class Station:
    """Runs until SIGTERM; `shared` holds, per camera, the results begun and the newest cseq, and then the rows that wait."""

    def __init__(self, plan: StationPlan, shared: MutableSequence[int]) -> None:
        self.plan, self.shared = plan, shared
        self.stop = threading.Event()
        settings = plan.settings()
        self.outbox = Outbox(
            plan.folder / "outbox.db",
            "chaos",
            lambda camera: f"{BASE}/{camera}/result",
            Limits.of(settings.delivery),
            settings.delivery.mode,
        )
        self.publisher = Publisher(settings, self.outbox, "chaos")
        self.publisher.on_command = self._command

    def run(self) -> None:
        """The main thread: looks after the shared numbers and says health."""
        self.publisher.start()
        producers = [threading.Thread(target=self._produce, args=(n, name)) for n, name in enumerate(CAMERAS)]
        for producer in producers:
            producer.start()
        health_s = time.monotonic()
        while not self.stop.wait(0.02):
            last = self.outbox.last_cseq()
            for n, camera in enumerate(CAMERAS):
                self.shared[len(CAMERAS) + n] = last.get(camera, 0)
            self.shared[ROWS] = self.outbox.status().rows
            if time.monotonic() >= health_s:
                health_s = time.monotonic() + HEALTH_EVERY_S
                self._say_health()
        for producer in producers:
            producer.join()
        self.publisher.stop()
        self.publisher.join(10)
        self.outbox.close()

    def _produce(self, place: int, camera: str) -> None:
        tick, first, started_s = threading.Event(), self.shared[place], time.monotonic()
        with (self.plan.folder / f"ledger-{self.plan.run:04d}-{camera}.jsonl").open("ab", buffering=0) as ledger:
            while self.shared[place] < self.plan.per_camera and not self.stop.is_set():
                tick.wait(max(0.0, started_s + (self.shared[place] - first) / self.plan.rate_hz - time.monotonic()))
                self.shared[place] += 1
                n = self.shared[place]
                name, bodies = f"{camera}-{n}", list[bytes]()

                def render(numbers: Numbers, n: int = n, bodies: list[bytes] = bodies) -> bytes:
                    bodies.append(payload(camera, n, numbers))
                    return bodies[-1]

                note(ledger, {"intended": name, "camera": camera})
                numbers = self.outbox.commit([Draft(camera, f"{BASE}/{camera}/result", name, render)])[0]
                note(ledger, confirmed(camera, name, numbers, bodies[-1]))

    def _command(self, topic: str, text: bytes, retained: bool) -> None:
        if topic == f"{BASE}/cmd/replay":
            asked = json.loads(text)["args"]
            self.publisher.replay(Replay(asked["camera"], asked["epoch"], asked["from"], asked["to"]))

    def _say_health(self) -> None:
        status, last, epoch = self.outbox.status(), self.outbox.last_cseq(), self.outbox.epoch
        outbox = {"rows": status.rows, "bytes": status.bytes, "oldest_s": status.oldest_s}
        fields = {"uptime_s": 0, "epoch": epoch, "last": last, "stages": {}, "counters": {}, "outbox": outbox}
        fields |= {"disk_free_mb": 1, "restarts": {}, "ts": rfc3339(utc_now()), "station": "chaos"}
        self.publisher.tell(f"{BASE}/health", lambda session: Health.model_validate({**fields, "session": session}))


def note(ledger: Any, line: dict[str, Any]) -> None:
    """One write, so that a kill tears at most the last line; what was written survives the process."""
    ledger.write((json.dumps(line) + "\n").encode())


def confirmed(camera: str, name: str, numbers: Numbers, body: bytes) -> dict[str, Any]:
    """The ledger's line after the commit."""
    return {
        "result_id": name,
        "camera": camera,
        "epoch": numbers.epoch,
        "seq": numbers.seq,
        "cseq": numbers.cseq,
        "crc": body_crc(body),
    }


def run_station(plan: StationPlan, shared: MutableSequence[int]) -> None:
    """Entry point of the process."""
    if plan.quick:
        publisher_module.BACKOFF_MAX_S, delivery.HOLD_S = 0.4, 0.3
    if plan.naive:
        run_naive(plan, shared)
        return
    station = Station(plan, shared)
    signal.signal(signal.SIGTERM, lambda *_: station.stop.set())
    station.run()


def run_naive(plan: StationPlan, shared: MutableSequence[int]) -> None:
    """The control: results go straight into the MQTT library, which queues and resends them in memory."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="naive", protocol=MQTTProtocolVersion.MQTTv5)
    client.reconnect_delay_set(1, 1)
    client.connect_async("127.0.0.1", plan.port, clean_start=False)
    client.loop_start()
    with (plan.folder / f"ledger-{plan.run:04d}.jsonl").open("ab", buffering=0) as ledger:
        while not stop.wait(1 / plan.rate_hz):
            for place, camera in enumerate(CAMERAS):
                if shared[place] >= plan.per_camera:
                    continue
                shared[place] += 1
                n = shared[place]
                numbers = Numbers("naive", n * len(CAMERAS) + place, n)
                body = payload(camera, n, numbers)
                note(ledger, {"intended": f"{camera}-{n}", "camera": camera})
                client.publish(f"{BASE}/{camera}/result", body, qos=1)
                note(ledger, confirmed(camera, f"{camera}-{n}", numbers, body))
                shared[len(CAMERAS) + place] = n
            shared[ROWS] = len(client._out_messages)
    client.disconnect()
    client.loop_stop()
