"""From a result's commit to its arrival at a subscriber, on loopback through Mosquitto, at a steady rate.

Station and subscriber are two processes, as on a line; both read CLOCK_MONOTONIC, which the kernel keeps for all. The clock starts
when `Outbox.commit` has returned, so the row is on disk, and stops when the subscriber's client hands the message over.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.table import show_table
from configs import load_text
from edge_dkm.bench.publish import sized_draft
from edge_dkm.mqtt.link import await_connack, open_link, pump
from edge_dkm.mqtt.publisher import Publisher
from edge_dkm.outbox import Draft, Outbox
from edge_dkm.settings import LineSettings, MqttSettings
from tests.broker import Mosquitto

TOPIC = "dkm/v1/st1/top/result"


def subscribe(port: int, count: int) -> None:
    """The other process: one line `result_id seconds` per message, after a line that says it listens."""
    settings = MqttSettings(host="127.0.0.1", port=port)
    link = open_link(settings, "subscriber", clean=True)
    await_connack(link, settings)
    arrived: list[tuple[bytes, float]] = []
    link.client.on_message = lambda _client, _data, message: arrived.append((message.payload, time.monotonic()))
    link.client.on_subscribe = lambda *_: print("listening", flush=True)
    link.client.subscribe(TOPIC, qos=1)
    while len(arrived) < count and link.lost is None:
        pump(link, 1.0)
    for payload, at_s in arrived:
        print(json.loads(payload)["result_id"], at_s)


def draft(n: int) -> Draft:
    """A result of the usual size."""
    return sized_draft(n, "top", TOPIC)


def measure(folder: Path, rate_hz: float, count: int) -> np.ndarray:
    """Milliseconds per result."""
    broker = Mosquitto(folder)
    port = str(broker.port)
    words = [sys.executable, "-m", "benchmarks.line.delivery", "--subscribe", port, "--count", str(count)]
    text = (
        f"station: st1\nmodel: none.onnx\ncameras: {{top: {{source: none}}}}\n"
        f"mqtt: {{host: 127.0.0.1, port: {port}}}\nstate: {folder}"
    )
    outbox = Outbox(folder / "outbox.db", "st1", lambda camera: TOPIC)
    publisher = Publisher(load_text(LineSettings, text, "delivery"), outbox, "benchmark")
    try:
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None and child.stdout.readline() == "listening\n"
            publisher.start()
            committed = commit_steadily(outbox, rate_hz, count)
            lines = child.communicate(timeout=60)[0].splitlines()
    finally:
        publisher.stop()
        publisher.join()
        broker.kill()
        outbox.close()
    return np.array([(float(at_s) - committed[number]) * 1000 for number, at_s in map(str.split, lines)])


def commit_steadily(outbox: Outbox, rate_hz: float, count: int) -> dict[str, float]:
    """When each result's commit had returned."""
    committed: dict[str, float] = {}
    tick, started_s = threading.Event(), time.monotonic()
    for n in range(count):
        tick.wait(max(0.0, started_s + n / rate_hz - time.monotonic()))
        outbox.commit([draft(n)])
        committed[str(n)] = time.monotonic()
    return committed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=30.0, help="results per second")
    parser.add_argument("--count", type=int, default=900)
    parser.add_argument("--subscribe", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.subscribe:
        return subscribe(arguments.subscribe, arguments.count)
    with tempfile.TemporaryDirectory() as folder:
        taken = measure(Path(folder), arguments.rate, arguments.count)
    rows = [[len(taken), *(float(np.percentile(taken, q)) for q in (50, 95, 99, 100)), "p99 <= 5"]]
    title = f"commit to subscriber at {arguments.rate:g} results/s, ms"
    show_table(title, ["results", "p50", "p95", "p99", "max", "asked"], rows)
    return None


if __name__ == "__main__":
    main()
