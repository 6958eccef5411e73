from __future__ import annotations

import os
import queue
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from devices.capture import CameraStatus, Capture, build_trigger, observe
from devices.frame import Frame
from devices.ring import MAX_SLOTS
from devices.settings import CameraSettings
from devices.triggers import Shot
from tests.devices.conftest import film
from tests.images import draw, write_png
from tests.waiting import wait_until


class Listener:
    """Collects what a capture thread delivers."""

    def __init__(self) -> None:
        self.shots: queue.Queue[Shot] = queue.Queue()
        self.statuses: queue.Queue[CameraStatus] = queue.Queue()
        self.capture: Capture | None = None

    def start(self, **settings: object) -> Capture:
        capture = Capture(
            "top",
            CameraSettings.model_validate({"pace": "max", **settings}),
            lambda _, shot: self.shots.put(shot),
            lambda _: self.statuses.put(self.capture.status()) if self.capture else None,
        )
        self.capture = capture
        capture.start()
        return capture

    def all_shots(self) -> list[Shot]:
        return [self.shots.get_nowait() for _ in range(self.shots.qsize())]


def test_every_frame_of_a_film_becomes_a_shot_and_the_capture_ends(tmp_path: Path) -> None:
    listener = Listener()
    capture = listener.start(source=str(film(tmp_path / "a.mp4")), roi=(4, 4, 16, 16))
    assert capture.ended.wait(20) and capture.error is None
    shots = listener.all_shots()
    assert [shot.trigger_id for shot in shots] == list(range(1, 13))
    assert shots[0].frame.image.shape == (16, 16, 3) and capture.frame_size == (64, 48)
    assert capture.status().frames == 12 and listener.statuses.get(timeout=5).state == "online"


def test_a_picture_outlives_the_camera_process_that_was_killed_while_it_was_looked_at(tmp_path: Path) -> None:
    listener = Listener()
    capture = listener.start(source=str(film(tmp_path / "a.mp4")), loop=True, pace="source", fps=100, policy="every")
    kept = [listener.shots.get(timeout=20).frame.image for _ in range(3)]
    before = [image.copy() for image in kept]
    assert capture.pid is not None
    os.kill(capture.pid, signal.SIGKILL)
    assert capture.ended.wait(20) and capture.error is not None and capture.error.code == "C-CRASH"
    assert all(np.array_equal(image, copy) for image, copy in zip(kept, before, strict=True))
    assert not kept[0].flags.owndata and not kept[0].flags.writeable  # they lie in the ring


def test_shots_that_nobody_looks_at_yet_do_not_hold_up_the_camera(tmp_path: Path) -> None:
    listener = Listener()
    capture = listener.start(source=str(film(tmp_path / "a.mp4")), loop=True, policy="every")
    wait_until(lambda: listener.shots.qsize() >= 5 * MAX_SLOTS)
    capture.stop()
    assert capture.ended.wait(20)
    ids = [shot.trigger_id for shot in listener.all_shots()]
    assert ids == list(range(1, len(ids) + 1))


def test_a_recorded_source_that_is_not_there_ends_with_its_error() -> None:
    capture = Listener().start(source="/nowhere/a.mp4")
    assert capture.ended.wait(20)
    assert capture.error is not None and capture.error.code == "C-NODEV"
    assert capture.status().state == "offline" and capture.status().code == "C-NODEV"


def test_a_roi_outside_the_frame_ends_a_recorded_source(tmp_path: Path) -> None:
    capture = Listener().start(source=str(film(tmp_path / "a.mp4")), roi=(0, 0, 640, 480))
    assert capture.ended.wait(20) and capture.error is not None and capture.error.code == "C-ROI"


def test_frames_that_change_their_size_are_another_camera(tmp_path: Path) -> None:
    for n, side in enumerate((32, 32, 40)):
        write_png(tmp_path / f"{n}.png", draw("disc", np.random.default_rng(n), side))
    capture = Listener().start(source=str(tmp_path))
    assert capture.ended.wait(20) and capture.error is not None
    assert capture.error.code == "C-CHANGED" and "frames were 32x32 and are now 40x40" in str(capture.error)


def test_a_live_camera_that_goes_away_is_reopened(mjpeg_camera: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devices.capture.RECONNECT_FIRST_S", 0.05)
    listener = Listener()
    capture = listener.start(source=mjpeg_camera, policy="every")
    states = [listener.statuses.get(timeout=20).state for _ in range(3)]
    capture.stop()
    assert states == ["online", "offline", "online"] and capture.status().reconnects >= 1
    assert capture.ended.wait(20)
    ids = [shot.trigger_id for shot in listener.all_shots()]
    assert ids == list(range(1, len(ids) + 1)) and len(ids) > 5  # numbering goes on across reconnects


def test_a_live_camera_that_is_not_there_is_waited_for_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("devices.capture.RECONNECT_FIRST_S", 0.01)
    monkeypatch.setattr("devices.capture.RECONNECT_MAX_S", 0.01)
    listener = Listener()
    capture = listener.start(source="usb:77")
    assert listener.statuses.get(timeout=20).code == "C-NODEV"
    wait_until(lambda: capture.status().reconnects >= 5)
    assert not capture.ended.is_set()
    capture.stop()
    assert capture.ended.wait(20)
    assert sum("usb:77 is not there" in record.message for record in caplog.records) == 1


def test_stopping_ends_a_film_that_loops_for_ever(tmp_path: Path) -> None:
    listener = Listener()
    capture = listener.start(source=str(film(tmp_path / "a.mp4")), loop=True, pace="source", fps=100)
    listener.shots.get(timeout=20)
    capture.stop()
    assert capture.ended.wait(20)


def test_whatever_a_source_raises_is_the_cameras_error_and_no_silent_end() -> None:
    listener = Listener()
    capture = listener.start(source=f"folder:/{'x' * 300}")
    assert capture.ended.wait(10)
    assert capture.error is not None and "File name too long" in str(capture.error)


def test_a_driver_that_gives_grey_pictures_gives_bad_frames() -> None:
    class Grey:
        def __iter__(self) -> Iterator[Frame]:
            yield Frame.now(np.zeros((48, 64, 1), np.uint8), 0)

        def close(self) -> None: ...

    settings = CameraSettings.model_validate(
        {"source": "usb:0", "trigger": {"kind": "part_present"}, "roi": [0, 0, 8, 8]}
    )
    (seen,) = observe(Grey(), settings, build_trigger(settings))  # type: ignore[arg-type]
    assert (
        seen.frame.fault is not None and seen.frame.fault.code == "F-SHAPE" and "(48, 64, 1)" in seen.frame.fault.detail
    )
