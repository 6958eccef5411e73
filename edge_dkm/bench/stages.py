"""One frame through the real parts of a line: the shared-memory ring, the model, the outbox; stage by stage, and through the pipeline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from devices.frame import Cropper, Frame
from devices.ring import RingReader, RingWriter
from devices.settings import CameraSettings
from devices.triggers import Shot
from edge_dkm.errors import EdgeError
from edge_dkm.inspector import Inspection, Inspector, Outputs
from edge_dkm.message import TriggerInfo, new_result_id
from edge_dkm.outbox import Draft, Outbox
from edge_dkm.pipeline import Pipeline
from edge_dkm.results import Case, Clockings, completed, fitted, model_info, timestamp
from edge_dkm.session import SPARE_FRAME

STATION, CAMERA = "bench", "bench"
TOPIC = f"dkm/v1/{STATION}/{CAMERA}/result"
WARM_UP = 10
COMMIT_S = 60.0
PICTURES = 8

Image = NDArray[np.uint8]
Times = NDArray[np.float64]


@dataclass(frozen=True)
class Scene:
    """What the camera gives: frames of noise, (H, W, 3) uint8, and the region of them that the model sees."""

    frames: Sequence[Image]
    roi: tuple[int, int, int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of what the model sees."""
        return self.roi[2], self.roi[3]

    @property
    def full_size(self) -> tuple[int, int]:
        """(width, height) of a frame."""
        height, width = self.frames[0].shape[:2]
        return width, height

    @property
    def images(self) -> list[Image]:
        """What the model sees, contiguous."""
        x, y, w, h = self.roi
        return [np.ascontiguousarray(frame[y : y + h, x : x + w]) for frame in self.frames]


def scene_of(inspector: Inspector, size: tuple[int, int] | None) -> Scene:
    """The training's frame and region; where `size` (width, height) is given, frames of that size."""
    spec = inspector.metadata.input
    width, height = size or spec.trained_size or SPARE_FRAME
    full, (x, y) = (width, height), (0, 0)
    if spec.roi is not None and spec.frame is not None and spec.roi[2:] == (width, height):
        full, (x, y) = spec.frame, spec.roi[:2]
    rng = np.random.default_rng(0)
    shape = (full[1], full[0], 3)
    return Scene(
        [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(PICTURES)],
        (int(x), int(y), int(width), int(height)),
    )


class Ring:
    """Both ends of a camera's ring, in one process."""

    def __init__(self, scene: Scene) -> None:
        self._scene, self._crop = scene, Cropper(scene.roi, copies=False)
        self._reader = RingReader()
        self._writer = RingWriter(self._reader.files)

    def pass_on(self, n: int) -> Frame:
        """Crops frame n while it is copied into a slot, and takes it out as the line does."""
        frames = self._scene.frames
        frame = self._crop(Frame.now(frames[n % len(frames)], n))
        self._writer.acquire(None)
        slot_bytes = self._writer.allocate(frame.image)
        if slot_bytes is not None:
            self._reader.attach(slot_bytes)
        return self._reader.read(self._writer.write(frame, n)).frame

    def close(self) -> None:
        """Gives the memory back."""
        self._reader.close()


def draft_of(inspector: Inspector, inspection: Inspection, captured_s: float, n: int) -> Draft:
    """The result as a line commits it."""
    now_s = time.monotonic()
    trigger = TriggerInfo(kind="free", id=n)
    case = Case(new_result_id(), STATION, CAMERA, trigger, timestamp(captured_s), captured_s, captured_s)
    model, clockings = model_info(inspector), Clockings(captured_s, now_s)
    return Draft(
        CAMERA, TOPIC, case.result_id, lambda numbers: fitted(completed(case, numbers, model, inspection, clockings))
    )


def time_stages(inspector: Inspector, scene: Scene, outbox: Outbox, count: int) -> Mapping[str, Times]:
    """Milliseconds of capture, graph, decision and commit, and of `inspect` (graph and decision), one frame after the other."""
    twin, graph_s = inspector.twin(), [0.0]
    run = inspector.run

    def timed(image: Image, names: Sequence[str], overrides: object = None) -> Outputs:
        started_s = time.perf_counter()
        outputs = run(image, names)
        graph_s[0] = time.perf_counter() - started_s
        return outputs

    twin.run = timed  # type: ignore[method-assign]
    ring = Ring(scene)
    rows = []
    try:
        for n in range(WARM_UP + count):
            marks = [time.perf_counter()]
            frame = ring.pass_on(n)
            marks.append(time.perf_counter())
            inspection = twin.inspect(frame.image)
            marks.append(time.perf_counter())
            outbox.commit([draft_of(inspector, inspection, frame.mono_s, n)])
            marks.append(time.perf_counter())
            capture, inspect, commit = np.diff(marks)
            rows.append((capture, graph_s[0], inspect - graph_s[0], commit, inspect))
            del frame
    finally:
        ring.close()
    columns = 1000 * np.array(rows[WARM_UP:]).T
    return dict(zip(("capture", "graph", "decision", "commit", "inspect"), columns, strict=True))


@dataclass(frozen=True)
class LineTimes:
    """`frame_to_commit`: milliseconds, one frame at a time. `frames_per_s`: with frames always waiting."""

    frame_to_commit: Times
    frames_per_s: float


def time_line(inspector: Inspector, scene: Scene, outbox: Outbox, count: int) -> LineTimes:
    """Through the threads of a line's own pipeline.

    Raises:
        EdgeError: the pipeline stopped, or committed nothing for a minute.
    """
    settings = {CAMERA: CameraSettings(source="synthetic:", policy="every")}
    committed = threading.Condition()

    def tell() -> None:
        with committed:
            committed.notify_all()

    pipeline = Pipeline(STATION, settings, {CAMERA: inspector}, outbox, lambda _: TOPIC, tell)
    ring = Ring(scene)
    pipeline.start()

    def put(n: int) -> None:
        pipeline.take(CAMERA, Shot(ring.pass_on(n), "free", n), False)

    def await_committed(total: int) -> None:
        with committed:
            done = committed.wait_for(lambda: pipeline.committed >= total or pipeline.failed is not None, COMMIT_S)
        if not done or pipeline.failed is not None:
            raise EdgeError(
                f"the pipeline stopped at {pipeline.committed} of {total} frames: {pipeline.failed or 'it hangs'}"
            )

    try:
        _one_by_one(put, await_committed, WARM_UP + count)
        alone = [timing.committed for timing in list(pipeline.timings)[WARM_UP:]]
        started_s = time.perf_counter()
        for n in range(count):
            put(n)
        await_committed(WARM_UP + 2 * count)
        rate = count / (time.perf_counter() - started_s)
    finally:
        pipeline.finish(COMMIT_S, lambda: True)
        ring.close()
    return LineTimes(np.array(alone), rate)


def _one_by_one(put: Callable[[int], None], await_committed: Callable[[int], None], count: int) -> None:
    for n in range(count):
        put(n)
        await_committed(n + 1)


def open_outbox(path: Path) -> Outbox:
    """A real one, on the disk of `path`."""
    return Outbox(path, STATION, lambda _: TOPIC)
