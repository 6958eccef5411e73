"""Four cameras of 30 frames/s on one station: SqueezeNet int8, every result committed and published to a real Mosquitto.

Each camera is a process of its own that decodes a film at its own rate, over and over, and cuts out a ROI of 448x448; the station is
`edge-dkm run`, the subscriber a third process. A frame that had to make way for a newer one is a dropped one. Frame to commit
begins when the camera process has the frame. The table says which process keeps how much of the cores busy: real cameras decode elsewhere,
and what else runs on the machine is no part of the measurement.

python -m benchmarks.edge.four_cameras [--seconds N] [--cameras N] [--fp32]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from benchmarks.edge.cpu_time import CpuTime, children
from benchmarks.edge.encoders import ROI_PX, run_of
from benchmarks.table import show_table
from edge_dkm.inspector import Inspector
from exporters.export import ExportOptions, export_run
from tests.broker import Mosquitto

FPS, CAMERAS, SECONDS = 30, 4, 60
FILM_SIZE, ROI = (640, 480), [96, 16, ROI_PX, ROI_PX]
FILM_FRAMES = 90
ASKED_P99_MS = 50.0


def write_film(path: Path, seed: int) -> Path:
    """Smooth moving stripes: what a decoder meets on a line, not noise."""
    width, height = FILM_SIZE
    film = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), FPS, FILM_SIZE)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    for n in range(FILM_FRAMES):
        wave = 127 + 60 * np.sin((x + 8 * n + 40 * seed) / 37) + 60 * np.cos((y - 5 * n) / 29)
        film.write(np.repeat(wave[..., None], 3, 2).astype(np.uint8))
    film.release()
    return path


def line_text(model: Path, films: list[Path], port: int, state: Path) -> str:
    """Line settings; free trigger, policy latest."""
    cameras = "\n".join(
        f"  cam{n}: {{source: 'file:{film}', roi: {ROI}, loop: true, fps: {FPS}, framing: any}}"
        for n, film in enumerate(films)
    )
    return (
        f"station: four\nmodel: {model}\ncameras:\n{cameras}\nmqtt: {{host: 127.0.0.1, port: {port}}}\nstate: {state}\n"
    )


def export_model(folder: Path, precision: str) -> tuple[Path, str]:
    """(file, its precision): fp32 where the exporter refused int8."""
    path = folder / "part.onnx"
    is_int8 = precision == "int8"
    export_run(run_of("SqueezeNet", folder, real=is_int8), path, ExportOptions(frame=(ROI_PX, ROI_PX), int8=is_int8))
    return path, Inspector(path).metadata.precision


def count_published(port: int, count: int) -> subprocess.Popen[str]:
    """Another process that prints how many different results came."""
    words = [sys.executable, "-m", "benchmarks.edge.four_cameras", "--subscribe", str(port), "--count", str(count)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "listening\n"
    return child


def subscribe(port: int, count: int) -> None:
    """Counts results by id until `count` of them came, or nothing comes for a while."""
    from edge_dkm.mqtt.link import await_connack, open_link, pump
    from edge_dkm.settings import MqttSettings

    settings = MqttSettings(host="127.0.0.1", port=port)
    link = open_link(settings, "four-cameras-subscriber", clean=True)
    await_connack(link, settings)
    link.client.subscribe("dkm/v1/four/+/result", qos=1)
    while not link.granted:
        pump(link, 1.0)
    print("listening", flush=True)
    seen: set[str] = set()
    quiet_s = 0.0
    while len(seen) < count and link.lost is None and quiet_s < 120:
        pump(link, 1.0)
        messages, link.messages = link.messages, []
        seen |= {json.loads(bytes(message.payload)).get("result_id", "") for message in messages}
        quiet_s = 0.0 if messages else quiet_s + 1.0
    print(len(seen))


@dataclass(frozen=True)
class Measured:
    """`report`: the line's own; `published`: results that the subscriber has; `cores`: how many each process kept busy."""

    report: dict
    published: int
    precision: str
    cores: dict[str, float]


def measure(folder: Path, cameras: int, seconds: float, precision: str) -> Measured:
    """Runs the line until it has committed what so many seconds give."""
    model, really = export_model(folder, precision)
    films = [write_film(folder / f"{n}.mp4", n) for n in range(cameras)]
    count = int(cameras * FPS * seconds)
    broker = Mosquitto(folder)
    try:
        with count_published(broker.port, count) as listener:
            line = folder / "line.yaml"
            line.write_text(line_text(model, films, broker.port, folder / "state"))
            words = [Path(sys.executable).with_name("edge-dkm"), "run", line, "--max-parts", str(count), "--json"]
            with (
                (folder / "log.txt").open("w") as log,
                subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True) as station,
            ):

                def groups() -> dict[str, list[int]]:
                    decoding = children(station.pid)
                    return {
                        "the line": [station.pid],
                        "cameras": decoding if len(decoding) == cameras else [],
                        "broker": [pid for pid in children(os.getpid()) if pid not in {station.pid, listener.pid}],
                        "subscriber": [listener.pid],
                    }

                cpu = CpuTime(groups)
                out = station.communicate()[0]
                cores = cpu.close()
            if station.returncode:
                listener.kill()
                sys.exit((folder / "log.txt").read_text()[-2000:])
            published = int(listener.communicate(timeout=180)[0].split()[-1])
    finally:
        broker.kill()
    return Measured(json.loads(out.splitlines()[-1]), published, really, cores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--cameras", type=int, default=CAMERAS)
    parser.add_argument("--fp32", action="store_true", help="the fp32 graph instead")
    parser.add_argument("--subscribe", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.subscribe:
        return subscribe(arguments.subscribe, arguments.count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        precision = "fp32" if arguments.fp32 else "int8"
        measured = measure(folder, arguments.cameras, arguments.seconds, precision)
        said = [line for line in (folder / "log.txt").read_text().splitlines() if "several cameras" in line]
    report, really = measured.report, measured.precision
    committed = report["latency_ms"]["capture to commit"]
    rows: list[list[object]] = [
        ["results committed", report["parts"], ""],
        [
            "different results at the subscriber",
            measured.published,
            f"{int(arguments.cameras * FPS * arguments.seconds)}",
        ],
        ["frames dropped", report["dropped"], "0"],
        ["bad frames", report["bad"], "0"],
        ["rate, results/s", report["parts"] / report["seconds"], ""],
        ["inference p50 / p99, ms", "{p50} / {p99}".format(**report["latency_ms"]["infer"]), ""],
        ["frame to commit p50, ms", committed["p50"], ""],
        ["frame to commit p99, ms", committed["p99"], f"< {ASKED_P99_MS:g}"],
        ["several cameras in one run", said[-1].partition("cameras: ")[2] if said else "not measured", ""],
        *(
            [f"cores kept busy: {name}", f"{cores:.2f} of {os.cpu_count()}", ""]
            for name, cores in measured.cores.items()
        ),
    ]
    title = f"{arguments.cameras} cameras of {FPS} frames/s, SqueezeNet {really}, ROI {ROI_PX}x{ROI_PX}, {arguments.seconds:g} s"
    show_table(title, ["what", "measured", "asked"], rows)
    return None


if __name__ == "__main__":
    main()
