from __future__ import annotations

import queue
from pathlib import Path

import numpy as np
import pytest

from devices.capture import Capture, build_trigger, observe
from devices.errors import CameraError
from devices.frame import Frame
from devices.privacy import PrivacyMask
from devices.settings import CameraSettings
from devices.sources import open_source
from devices.triggers import Shot
from tests.images import draw, write_png

LEFT_HALF = [[[0, 0], [15, 0], [15, 31], [0, 31]]]


def camera(tmp_path: Path, **settings: object) -> CameraSettings:
    write_png(tmp_path / "a.png", draw("square", np.random.default_rng(0)) | 1)
    return CameraSettings.model_validate({"source": str(tmp_path), "pace": "max", **settings})


def shot_of(settings: CameraSettings) -> Shot:
    shots: queue.SimpleQueue[Shot] = queue.SimpleQueue()
    capture = Capture("top", settings, lambda _, shot: shots.put(shot), lambda _: None)
    capture.start()
    assert capture.ended.wait(20) and capture.error is None
    capture.join(20)
    return shots.get_nowait()


def test_what_the_mask_hides_is_black_in_the_shot_and_the_rest_is_untouched(tmp_path: Path) -> None:
    settings = camera(tmp_path, mask=LEFT_HALF)
    image = shot_of(settings).frame.image
    assert not image[:, :16].any() and image[:, 16:].all()
    control = shot_of(settings.model_copy(update={"mask": ()})).frame.image
    assert control[:, :16].all() and np.array_equal(control[:, 16:], image[:, 16:])


def test_the_mask_is_in_frame_pixels_whatever_the_roi(tmp_path: Path) -> None:
    image = shot_of(camera(tmp_path, mask=LEFT_HALF, roi=[8, 0, 16, 16])).frame.image
    assert not image[:, :8].any() and image[:, 8:].all()


def test_recording_hides_the_same(tmp_path: Path) -> None:
    settings = camera(tmp_path, mask=LEFT_HALF)
    (seen,) = observe(open_source(settings), settings, build_trigger(settings))
    assert not seen.frame.image[:, :16].any() and seen.frame.image[:, 16:].all()


def test_the_frames_own_memory_is_blackened() -> None:
    image = np.full((32, 32, 3), 200, np.uint8)
    PrivacyMask((((0, 0), (31, 0), (31, 31), (0, 31)),))(Frame.now(image, 0))
    assert not image.any()


def test_a_mask_drawn_for_another_resolution_is_an_error_and_not_a_leak(tmp_path: Path) -> None:
    settings = camera(tmp_path, mask=[[[0, 0], [640, 0], [640, 480]]])
    with pytest.raises(CameraError, match=r"C-MASK mask polygon 0 reaches to 640,480, but the frames are 32x32"):
        list(observe(open_source(settings), settings, build_trigger(settings)))


@pytest.mark.parametrize("polygon", [[[0, 0], [1, 1]], [[0, 0], [1, 1], [-1, 2]], [[0, 0], [1, 1], [2]]])
def test_a_polygon_needs_three_points_inside_the_frame(polygon: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="mask"):
        CameraSettings.model_validate({"source": "usb:0", "mask": [polygon]})
