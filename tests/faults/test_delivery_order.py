"""P5: whatever cuts the connection, the first copies of a camera's results come in their order, in every mode that keeps them."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import load_text
from edge_dkm.mqtt import publisher as publisher_module
from edge_dkm.settings import LineSettings
from tests.faults.fake_broker import Behaviour, FakeBroker, Publish
from tests.stations import Station
from tests.waiting import wait_until

BASE = "dkm/v1/st1"


@pytest.fixture
def broker() -> Iterator[FakeBroker]:
    with FakeBroker() as running:
        yield running


@pytest.mark.parametrize("connections", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["journal", "e2e"])
def test_first_copies_keep_their_order_over_many_connections_that_are_cut(
    tmp_path: Path, broker: FakeBroker, monkeypatch: pytest.MonkeyPatch, mode: str, connections: int
) -> None:
    monkeypatch.setattr(publisher_module, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(publisher_module, "BACKOFF_MAX_S", 0.02)
    rng = random.Random(5)
    broker.behaviour = Behaviour(connack_delay_s=0.01, drop_after=7)
    text = f"station: st1\nmodel: none.onnx\ncameras: {{top: {{source: none}}}}\nmqtt: {{host: 127.0.0.1, port: {broker.port}}}\ndelivery: {{mode: {mode}}}"
    station = Station(load_text(LineSettings, text, "line.yaml"), tmp_path / "outbox.db")
    produced, stop = itertools.count(1), threading.Event()
    made = {"top": 0, "side": 0}

    def produce() -> None:
        while not stop.wait(0.003):  # also between CONNECT and CONNACK
            camera = rng.choice(list(made))
            station.commit(next(produced), 1, camera)
            made[camera] += 1

    def consume() -> None:
        while station.publisher.is_alive() and not (stop.is_set() and station.outbox.status().rows == 0):
            upto = max((json.loads(publish.payload)["seq"] for publish in results()), default=0)
            ack = {"schema": "dkm.ack/1", "epoch": station.outbox.epoch, "upto": upto}
            broker.send(f"{BASE}/ack", json.dumps(ack).encode())
            broker.behaviour.drop_after = rng.randint(3, 12) if not stop.is_set() else None
            time.sleep(0.02)

    def results() -> list[Publish]:
        return [publish for publish in list(broker.received)[-200:] if publish.topic.endswith("/result")]

    threads = [threading.Thread(target=produce), threading.Thread(target=consume)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(broker.connects) >= connections, timeout_s=120)
    finally:
        stop.set()
        threads[0].join()
    broker.behaviour = Behaviour()
    assert station.publisher.wait_drained(20)
    threads[1].join()
    for camera, count in made.items():
        payloads = [json.loads(publish.payload) for publish in broker.of(f"{BASE}/{camera}/result")]
        assert list(dict.fromkeys(payload["cseq"] for payload in payloads)) == list(range(1, count + 1))
    station.close()
