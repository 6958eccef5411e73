from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devices.frame import Frame
from devices.settings import CameraSettings
from devices.triggers import Shot
from edge_dkm import Inspector
from edge_dkm.errors import StorageError
from edge_dkm.inspector import Inspection
from edge_dkm.message import TriggerInfo
from edge_dkm.outbox import Numbers, Outbox
from edge_dkm.pipeline import Pipeline
from edge_dkm.results import Case
from edge_dkm.shot_buffer import MAX_WAITING, ShotBuffer, Tally
from tests.images import draw
from tests.waiting import wait_until


def shot(n: int = 1, image: np.ndarray | None = None, kind: str = "free") -> Shot:
    pixels = draw("disc", np.random.default_rng(n)) if image is None else image
    return Shot(Frame(pixels, n, time.monotonic()), kind, n)


def case(camera: str = "top", n: int = 1) -> Case:
    return Case(f"r{n}", "st1", camera, TriggerInfo(kind="free", id=n), "ts", 0.0, 0.0)


class Gate:
    """An inspector that can be held up, and that counts."""

    def __init__(self, inspector: Inspector) -> None:
        self._inspector, self.open = inspector, threading.Event()
        self.open.set()
        self.inspected = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inspector, name)

    def inspect(self, image: np.ndarray) -> Inspection:
        self.open.wait(20)
        self.inspected += 1
        return self._inspector.inspect(image)


@pytest.fixture
def gate(tiny_model_path: Path) -> Gate:
    return Gate(Inspector(tiny_model_path))


@pytest.fixture
def build(gate: Gate, tmp_path: Path) -> Iterator[Callable[..., Pipeline]]:
    """A started pipeline with cameras of the given settings."""
    built: list[Pipeline] = []

    def make(**cameras: dict[str, Any]) -> Pipeline:
        settings = {name: CameraSettings.model_validate({"source": "x", **values}) for name, values in cameras.items()}
        box = Outbox(tmp_path / "outbox.db", "st1", lambda camera: f"t/{camera}/result")
        built.append(
            Pipeline(
                "st1",
                settings,
                {name: gate for name in settings},
                box,
                lambda camera: f"t/{camera}/result",
                lambda: None,
            )
        )  # type: ignore[arg-type, misc]
        built[-1].start()
        return built[-1]

    yield make
    gate.open.set()
    for pipeline in built:
        pipeline.finish(20)
        pipeline.outbox.close()


def results(pipeline: Pipeline) -> list[dict[str, Any]]:
    return [json.loads(row.body) for row in pipeline.outbox.unsent(0, 10_000)]


def test_every_shot_of_a_camera_that_takes_every_frame_becomes_one_result_in_order(
    build: Callable[..., Pipeline],
) -> None:
    pipeline = build(top={"policy": "every"})
    for n in range(1, 41):
        pipeline.take("top", shot(n), is_part=False)
    assert pipeline.finish(20)
    rows = results(pipeline)
    assert [row["trigger"]["id"] for row in rows] == list(range(1, 41)) and [row["cseq"] for row in rows] == list(
        range(1, 41)
    )
    assert {row["state"] for row in rows} == {"completed"}


def test_the_newest_frame_wins_and_the_skipped_ones_are_counted_exactly(
    build: Callable[..., Pipeline], gate: Gate
) -> None:
    pipeline = build(top={"policy": "latest"})
    gate.open.clear()
    for n in range(1, 31):
        pipeline.take("top", shot(n), is_part=False)
    gate.open.set()
    assert pipeline.finish(20)
    tally = pipeline.tallies["top"]
    assert results(pipeline)[-1]["trigger"]["id"] == 30
    assert tally.dropped["superseded"] > 0 and tally.frames == 30 == tally.results + tally.bad + sum(
        tally.dropped.values()
    )


def test_a_part_is_never_superseded_but_waits_for_room(build: Callable[..., Pipeline], gate: Gate) -> None:
    pipeline = build(top={"policy": "latest"})
    gate.open.clear()
    count = MAX_WAITING + 10

    def deliver() -> None:
        for n in range(1, count + 1):
            pipeline.take("top", shot(n, kind="part_present"), is_part=True)

    thread = threading.Thread(target=deliver)
    thread.start()
    wait_until(lambda: len(pipeline._buffer) == MAX_WAITING)
    assert thread.is_alive()
    gate.open.set()
    thread.join(20)
    assert pipeline.finish(20)
    assert [row["trigger"]["id"] for row in results(pipeline)] == list(range(1, count + 1)) and not pipeline.tallies[
        "top"
    ].dropped


def test_a_parts_intent_is_on_disk_before_it_is_inspected_and_closed_by_its_result(
    build: Callable[..., Pipeline], gate: Gate
) -> None:
    pipeline = build(top={})
    gate.open.clear()
    pipeline.take("top", shot(7, kind="part_present"), is_part=True)
    assert [(i.camera, i.trigger_id) for i in pipeline.outbox.open_intents()] == [("top", 7)] and gate.inspected == 0
    gate.open.set()
    assert pipeline.finish(20)
    assert pipeline.outbox.open_intents() == [] and len(results(pipeline)) == 1


def test_cameras_take_turns(tiny_model_path: Path) -> None:
    tallies = {"a": Tally(), "b": Tally()}
    buffer = ShotBuffer({"a": "every", "b": "every"}, tallies)
    for n in range(3):
        for camera in ("a", "a", "b"):
            buffer.put(case(camera, n), shot(n), is_part=False)
    buffer.close()
    order = [found[0].camera for _ in range(9) if (found := buffer.get())]
    assert order[:6].count("b") == 3 and len(order) == 9 and buffer.get() is None


def test_a_faulty_frame_becomes_a_declared_bad_frame_and_never_a_cluster(build: Callable[..., Pipeline]) -> None:
    pipeline = build(top={"policy": "every"})
    pipeline.take("top", Shot(Frame.faulty("F-DECODE", "c.png: not an image", 1), "free", 1), is_part=False)
    pipeline.take("top", shot(2, np.zeros((4, 4, 3), np.float32)), is_part=False)  # type: ignore[arg-type]
    assert pipeline.finish(20)
    rows = results(pipeline)
    assert [(r["state"], r["verdict"], r["error"]["code"]) for r in rows] == [
        ("bad_frame", "error", "F-DECODE"),
        ("bad_frame", "error", "F-DTYPE"),
    ]
    assert all("cluster" not in r and "novelty" not in r for r in rows) and pipeline.tallies["top"].bad == 2


def test_a_missed_deadline_is_a_declared_failure(build: Callable[..., Pipeline], gate: Gate) -> None:
    pipeline = build(top={"policy": "every", "deadline_ms": 50})
    pipeline.take("top", shot(1), is_part=False)
    wait_until(lambda: pipeline.committed == 1)
    gate.open.clear()
    pipeline.take("top", shot(2), is_part=False)
    time.sleep(0.1)  # the deadline passes
    gate.open.set()
    assert pipeline.finish(20)
    rows = results(pipeline)
    assert rows[0]["state"] == "completed"
    assert (rows[1]["state"], rows[1]["error"]["code"], rows[1]["verdict"]) == ("failed", "R-DEADLINE", "error")


def test_a_disk_that_fails_stops_the_line_with_the_reason(build: Callable[..., Pipeline]) -> None:
    pipeline = build(top={"policy": "every"})

    def fails(_: object) -> list[Numbers]:
        raise StorageError("outbox x cannot be written: disk I/O error")

    pipeline.outbox.commit = fails  # type: ignore[assignment,method-assign]
    pipeline.take("top", shot(1), is_part=False)
    wait_until(lambda: pipeline.failed is not None)
    assert "cannot be written" in str(pipeline.failed)


def test_timings_of_capture_inference_and_commit_are_kept(build: Callable[..., Pipeline]) -> None:
    pipeline = build(top={"policy": "every"})
    pipeline.take("top", shot(1), is_part=False)
    assert pipeline.finish(20)
    timing = pipeline.timings[0]
    assert 0 < timing.infer <= timing.total <= timing.committed
    assert results(pipeline)[0]["timing_ms"]["total"] == timing.total


def test_stages_show_progress(build: Callable[..., Pipeline]) -> None:
    pipeline = build(top={"policy": "every"})
    for n in range(5):
        pipeline.take("top", shot(n), is_part=False)
    assert pipeline.finish(20)
    assert {name: stage.health().count for name, stage in pipeline.stages.items()} == {"infer": 5, "commit": 5}
