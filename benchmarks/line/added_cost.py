"""What the outbox and the publisher cost: CPU per result, and the time they add between a result and its arrival at a subscriber.

Both ways run after each other in the same minute, in processes of their own: through the outbox (the clock starts before the commit),
and with plain paho (`loop_start`, QoS 1, nothing on disk). Same payload, same broker, same subscriber.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from benchmarks.line.delivery import TOPIC, draft
from benchmarks.table import show_table
from configs import load_text
from edge_dkm.mqtt.publisher import Publisher
from edge_dkm.outbox import Numbers, Outbox
from edge_dkm.settings import LineSettings
from tests.broker import Mosquitto

ASKED_MS = {30.0: 2.0, 500.0: 20.0}
CPU_ASKED_MS = 1.0
WARM_UP = 20  # results that are not counted: connection, first pages


@contextlib.contextmanager
def outbox_sender(port: int, folder: Path) -> Iterator[Callable[[int], None]]:
    """Commits; the publisher does the rest."""
    text = (
        f"station: st1\nmodel: none.onnx\ncameras: {{top: {{source: none}}}}\nmqtt: {{host: 127.0.0.1, port: {port}}}\n"
        f"state: {folder}"
    )
    outbox = Outbox(folder / "outbox.db", "st1", lambda camera: TOPIC)
    publisher = Publisher(load_text(LineSettings, text, "added_cost"), outbox, "benchmark")
    publisher.start()
    try:
        yield lambda n: outbox.commit([draft(n)]) and None
        assert publisher.wait_drained(60)
    finally:
        publisher.stop()
        publisher.join()
        outbox.close()


@contextlib.contextmanager
def plain_sender(port: int, folder: Path) -> Iterator[Callable[[int], None]]:
    """The MQTT library as its examples show it."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="plain", protocol=MQTTProtocolVersion.MQTTv5)
    client.connect("127.0.0.1", port)
    client.loop_start()

    def send(n: int) -> None:
        client.publish(TOPIC, draft(n).render(Numbers("e", n, n)), qos=1)

    try:
        yield send
        while client.want_write() or client._out_messages:
            time.sleep(0.01)
    finally:
        client.disconnect()
        client.loop_stop()


SENDERS = {"outbox": outbox_sender, "plain": plain_sender}


def send_steadily(kind: str, port: int, rate_hz: float, count: int) -> None:
    """The sending process: one JSON object with when each result began, and the CPU time of all of them."""
    with tempfile.TemporaryDirectory() as folder, SENDERS[kind](port, Path(folder)) as send:
        tick, began = threading.Event(), {}
        started_s, cpu_s = time.monotonic(), 0.0
        for n in range(count):
            tick.wait(max(0.0, started_s + n / rate_hz - time.monotonic()))
            if n == WARM_UP:
                cpu_s = time.process_time()
            began[str(n)] = time.monotonic()
            send(n)
        cpu_s = time.process_time() - cpu_s
        print(json.dumps({"began": began, "cpu_s": cpu_s}))


def measure(kind: str, rate_hz: float, count: int) -> tuple[np.ndarray, float]:
    """(milliseconds from a result to its arrival, CPU milliseconds per result)."""
    with tempfile.TemporaryDirectory() as folder:
        broker = Mosquitto(Path(folder))
        port = str(broker.port)
        listen = [sys.executable, "-m", "benchmarks.line.delivery", "--subscribe", port, "--count", str(count)]
        words = [sys.executable, "-m", "benchmarks.line.added_cost", "--send", kind, "--port", port]
        words += ["--rate", str(rate_hz), "--count", str(count)]
        try:
            with subprocess.Popen(listen, stdout=subprocess.PIPE, text=True) as child:
                assert child.stdout is not None and child.stdout.readline() == "listening\n"
                sent = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
                lines = child.communicate(timeout=60)[0].splitlines()
        finally:
            broker.kill()
    pairs = [line.split() for line in lines]
    taken = np.array([(float(at_s) - sent["began"][n]) * 1000 for n, at_s in pairs if int(n) >= WARM_UP])
    return taken, sent["cpu_s"] * 1000 / (count - WARM_UP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="per rate and way")
    parser.add_argument("--send", choices=SENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.send:
        return send_steadily(arguments.send, arguments.port, arguments.rate, arguments.count)
    rows: list[list[object]] = []
    is_kept = True
    for rate_hz, asked_ms in ASKED_MS.items():
        count = WARM_UP + int(arguments.seconds * rate_hz)
        plain_ms, plain_cpu = measure("plain", rate_hz, count)
        ours_ms, cpu = measure("outbox", rate_hz, count)
        p99 = [float(np.percentile(values, 99)) for values in (plain_ms, ours_ms)]
        p50 = [float(np.percentile(values, 50)) for values in (plain_ms, ours_ms)]
        added = p99[1] - p99[0]
        is_kept = is_kept and added <= asked_ms and cpu <= CPU_ASKED_MS
        rows.append([f"{rate_hz:g}", *p50, *p99, added, f"<= {asked_ms:g}", plain_cpu, cpu, f"<= {CPU_ASKED_MS:g}"])
    header = ["results/s", "plain p50", "ours p50", "plain p99", "ours p99", "added p99", "asked"]
    show_table(
        "from a result to a subscriber, ms, and CPU of the sending process per result, ms",
        [*header, "plain CPU", "our CPU", "asked"],
        rows,
    )
    return sys.exit(0 if is_kept else 1)


if __name__ == "__main__":
    main()
