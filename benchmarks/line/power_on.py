"""From the start of `edge-dkm run` to its first verdict at a subscriber, with files in the cache, as after a restart of the service."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.table import show_table
from tests.broker import Mosquitto, Subscriber
from tests.faults.station import RealStation, build_model, line_settings
from tests.waiting import wait_until

ASKED_S = 10.0


def measure(model: Path, images: Path, folder: Path) -> float:
    """Seconds of one start."""
    broker = Mosquitto(folder)
    subscriber = Subscriber(broker.port)
    try:
        cameras = f"{{top: {{source: '{images}', pace: source, fps: 20, loop: true, policy: every, framing: any}}}}"
        settings = line_settings(model, folder / "state", broker.port, cameras=cameras)
        started_s = time.monotonic()
        with RealStation(settings, folder / "station"):
            wait_until(lambda: bool(subscriber.of("dkm.result/1")), timeout_s=60)
            return time.monotonic() - started_s
    finally:
        subscriber.close()
        broker.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="an exported model with its golden images (default: a tiny one)")
    parser.add_argument("--starts", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        tiny = build_model(Path(name))
        model = arguments.model or tiny
        seconds = []
        for n in range(arguments.starts + 1):  # the first one fills the cache
            (Path(name) / str(n)).mkdir()
            seconds.append(measure(model, tiny.parent / "images" / "disc", Path(name) / str(n)))
    warm = sorted(seconds[1:])
    rows = [[model.name, len(warm), warm[len(warm) // 2], warm[-1], f"< {ASKED_S:g}"]]
    show_table(
        "from process start to the first verdict at a subscriber, s",
        ["model", "starts", "median", "max", "asked"],
        rows,
    )
    sys.exit(0 if warm[-1] < ASKED_S else 1)


if __name__ == "__main__":
    main()
