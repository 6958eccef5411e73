"""A real film of a belt through the whole line: record, train, export, run against Mosquitto, check every message.

Counted by eye on the saved frames of the shots (frames 296, 514, 678 and 856 of the film): three white switches leave the region,
then one orange cone. The model learns from every frame of the first two switches; one group per part, so nothing is calibrated
(`novelty: none`) and the score only ranks.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from benchmarks.table import WEIGHTS, real_set, show_table
from edge_dkm.message_schema import json_schema
from tests.broker import Mosquitto, Subscriber
from tests.waiting import wait_until

SWITCHES, CONES = 3, 1
PARTS = SWITCHES + CONES


@dataclass(frozen=True)
class Line:
    """What the subscriber saw. `results` are first copies in order of arrival."""

    results: list[dict[str, Any]]
    raw: int
    messages: int
    schemas: list[str]

    @property
    def scores(self) -> list[float]:
        """Novelty score per part, in the order of the film."""
        return [result["novelty"]["score"] for result in self.results]

    @property
    def is_gapless(self) -> bool:
        """Whether cseq counts 1, 2, 3, .. without a hole."""
        return [result["cseq"] for result in self.results] == list(range(1, len(self.results) + 1))


def command(name: str, *words: str | Path) -> None:
    """Runs an installed command of ours; ends the script where it fails."""
    subprocess.run([Path(sys.executable).with_name(name), *words], check=True, stdout=subprocess.DEVNULL)


def set_all(places: list[str]) -> list[str]:
    """`--set` before each."""
    return [word for place in places for word in ("--set", place)]


def learn(folder: Path) -> list[str]:
    """Records the first two switches, trains, exports; returns the settings that the line needs to run the model."""
    film = f"cameras.belt.source=file:{real_set('conveyor_belt.mp4')}"
    frames, run, model = folder / "frames", folder / "run", folder / "part.onnx"
    command("edge-dkm", "record", "conveyor", "--frames", "all", "--parts", "2", "--out", frames, "--set", film)
    command("dkm-train", "fit", "conveyor", *set_all([f"data.path={frames}", WEIGHTS]), "--out", run)
    command("dkm-export", run, "-o", model)
    return [film, f"model={model}", f"state={folder / 'state'}"]


def measure(folder: Path) -> Line:
    """Runs all of it in `folder`. Every message is validated against its JSON Schema as it is counted.

    Raises:
        jsonschema.ValidationError: a message is not what its schema says.
    """
    places = learn(folder)
    broker = Mosquitto(folder)
    try:
        subscriber = Subscriber(broker.port)
        places += ["mqtt.host=127.0.0.1", f"mqtt.port={broker.port}"]
        command("edge-dkm", "run", "conveyor", *set_all(places))
        wait_until(lambda: "stopped" in [m["state"] for m in subscriber.of("dkm.status/1")])
        subscriber.close()
    finally:
        broker.kill()
    for _, payload, _ in subscriber.messages:
        jsonschema.Draft202012Validator(json_schema(payload["schema"])).validate(payload)
    schemas = sorted({payload["schema"] for _, payload, _ in subscriber.messages})
    return Line(subscriber.results(), len(subscriber.of("dkm.result/1")), len(subscriber.messages), schemas)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        line = measure(Path(folder))
    rows = [
        ["results / parts counted by eye", f"{len(line.results)} / {PARTS}"],
        ["raw results, duplicates among them", f"{line.raw}, {line.raw - len(line.results)}"],
        ["cseq gapless", line.is_gapless],
        ["novelty score of the switches", ", ".join(f"{score:.3f}" for score in line.scores[:SWITCHES])],
        ["novelty score of the cone", ", ".join(f"{score:.3f}" for score in line.scores[SWITCHES:])],
        ["messages, all valid", f"{line.messages} ({', '.join(line.schemas)})"],
    ]
    show_table("conveyor_belt.mp4 through Mosquitto", ["what", "seen"], rows)


if __name__ == "__main__":
    main()
