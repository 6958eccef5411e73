"""Brokers, subscribers and a line on drawn parts as fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from configs import load_text
from edge_dkm.mqtt import delivery as delivery_module
from edge_dkm.mqtt import publisher as publisher_module
from edge_dkm.mqtt.embedded_broker import find_mosquitto
from edge_dkm.settings import LineSettings
from tests.broker import Mosquitto, Subscriber
from tests.images import draw, write_png
from tests.stations import Station


@pytest.fixture
def start_broker(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """Starts brokers with further lines of configuration; all are killed at the end. Skips where Mosquitto is not installed."""
    if find_mosquitto() is None:
        pytest.skip("Mosquitto is not installed")
    running: list[Mosquitto] = []

    def start(extra: str = "allow_anonymous true\n") -> Mosquitto:
        running.append(Mosquitto(tmp_path, extra))
        return running[-1]

    yield start
    for broker in running:
        broker.kill()


@pytest.fixture
def mosquitto(start_broker: Callable[..., Mosquitto]) -> Mosquitto:
    """A running broker."""
    return start_broker()


@pytest.fixture
def subscribe() -> Iterator[Callable[..., Subscriber]]:
    """Subscribers by port; all are closed at the end."""
    opened: list[Subscriber] = []

    def make(port: int, topic: str = "#") -> Subscriber:
        opened.append(Subscriber(port, topic))
        return opened[-1]

    yield make
    for subscriber in opened:
        subscriber.close()


@pytest.fixture
def part_folder(tmp_path: Path) -> Path:
    """Twelve images of the three kinds that the tiny model knows, as a camera."""
    folder = tmp_path / "parts"
    rng = np.random.default_rng(42)
    for n in range(12):
        write_png(folder / f"{n:03d}.png", draw(("disc", "square", "bars")[n % 3], rng))
    return folder


@pytest.fixture
def make_line(tiny_model_path: Path, part_folder: Path, tmp_path: Path) -> Callable[..., LineSettings]:
    """Line settings for the tiny model on the folder of parts; keyword arguments replace whole sections."""

    def make(port: int, **sections: str) -> LineSettings:
        values = {
            "station": "st1",
            "model": str(tiny_model_path),
            "cameras": f"{{top: {{source: '{part_folder}', pace: max, policy: every}}}}",
            "mqtt": f"{{host: 127.0.0.1, port: {port}}}",
            "state": str(tmp_path / "state"),
            **sections,
        }
        return load_text(LineSettings, "\n".join(f"{key}: {value}" for key, value in values.items()), "line.yaml")

    return make


@pytest.fixture
def start_station(
    make_line: Callable[..., LineSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Station]]:
    """Starts a station; closed at the end."""
    monkeypatch.setattr(publisher_module, "BACKOFF_MAX_S", 0.3)
    monkeypatch.setattr(delivery_module, "HOLD_S", 0.2)
    stations: list[Station] = []

    def make(port: int, **sections: str) -> Station:
        stations.append(Station(make_line(port, **sections), tmp_path / f"outbox-{len(stations)}.db"))
        return stations[-1]

    yield make
    for station in stations:
        if station.publisher.is_alive():
            station.close()
