"""From the outbox through a real broker to a subscriber, one result at a time; on loopback, since a network is not the device's."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_dkm.bench.stages import CAMERA, STATION, TOPIC, open_outbox
from edge_dkm.errors import BrokerError
from edge_dkm.mqtt.embedded_broker import EmbeddedBroker, as_embedded_speaks
from edge_dkm.mqtt.link import await_connack, open_link, pump
from edge_dkm.mqtt.publisher import Publisher
from edge_dkm.outbox import Draft, Numbers, Outbox
from edge_dkm.settings import LineSettings, MqttSettings

WARM_UP = 5
ARRIVAL_S = 10.0
RESULT_BYTES = 700  # a result's usual size


def time_publish(folder: Path, count: int) -> NDArray[np.float64]:
    """Milliseconds from the return of a commit to the arrival at a subscriber.

    Raises:
        BrokerError: no broker is installed, or it does not deliver.
    """
    settings = as_embedded_speaks(_settings(folder))
    broker = EmbeddedBroker(settings.mqtt.effective_port, folder / "broker")
    try:
        with _subscriber(settings.mqtt) as arrivals:
            outbox = open_outbox(folder / "publish.db")
            publisher = Publisher(settings, outbox, "edge-dkm bench")
            publisher.start()
            try:
                return np.array([_publish(outbox, arrivals, n) for n in range(WARM_UP + count)][WARM_UP:])
            finally:
                publisher.stop()
                publisher.join(ARRIVAL_S)
                outbox.close()
    finally:
        broker.close()


class Arrivals:
    """When each result came, by its id; written by the subscriber's thread."""

    def __init__(self) -> None:
        self._at_s: dict[str, float] = {}
        self._changed = threading.Condition()

    def came(self, result_id: str, at_s: float) -> None:
        """Notes it."""
        with self._changed:
            self._at_s[result_id] = at_s
            self._changed.notify_all()

    def wait(self, result_id: str) -> float:
        """Monotonic seconds of the arrival.

        Raises:
            BrokerError: it does not come.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: result_id in self._at_s, ARRIVAL_S):
                raise BrokerError(f"a result did not come back from the broker within {ARRIVAL_S:g} s")
            return self._at_s[result_id]


def sized_draft(n: int, camera: str, topic: str) -> Draft:
    """A result of the usual size, numbered `n`."""

    def render(numbers: Numbers) -> bytes:
        body = {
            "schema": "dkm.result/1",
            "result_id": str(n),
            "epoch": numbers.epoch,
            "seq": numbers.seq,
            "cseq": numbers.cseq,
            "ts": "2000-01-01T00:00:00.000000Z",
        }
        return json.dumps(body | {"filler": "x" * (RESULT_BYTES - len(json.dumps(body)))}).encode()

    return Draft(camera, topic, str(n), render)


def _publish(outbox: Outbox, arrivals: Arrivals, n: int) -> float:
    outbox.commit([sized_draft(n, CAMERA, TOPIC)])
    committed_s = time.monotonic()
    return (arrivals.wait(str(n)) - committed_s) * 1000


@contextmanager
def _subscriber(settings: MqttSettings) -> Iterator[Arrivals]:
    link = open_link(settings, "edge-dkm-bench-subscriber", clean=True)
    await_connack(link, settings)
    link.client.subscribe(TOPIC, qos=1)
    arrivals, stopped = Arrivals(), threading.Event()

    def listen() -> None:
        while not stopped.is_set() and link.lost is None:
            pump(link, 0.1)
            at_s = time.monotonic()
            messages, link.messages = link.messages, []
            for message in messages:
                arrivals.came(json.loads(bytes(message.payload))["result_id"], at_s)

    thread = threading.Thread(target=listen, name="bench-subscriber", daemon=True)
    while not link.granted and link.lost is None:
        pump(link, 0.1)
    thread.start()
    try:
        yield arrivals
    finally:
        stopped.set()
        thread.join()
        link.client.disconnect()


def _settings(folder: Path) -> LineSettings:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return LineSettings.model_validate(
        {
            "station": STATION,
            "model": "bench.onnx",
            "cameras": {CAMERA: {"source": "synthetic:"}},
            "mqtt": {"port": port},
            "state": str(folder),
        }
    )
