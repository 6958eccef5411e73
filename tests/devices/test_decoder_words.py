from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

from devices.capture import Capture
from devices.settings import CameraSettings
from devices.sources.picture import decode_picture
from devices.triggers import Shot

rng = np.random.default_rng(3)


def picture() -> bytes:
    noise = rng.normal(110, 60, (120, 160, 3)).clip(0, 255).astype(np.uint8)
    return bytes(cv2.imencode(".jpg", cv2.GaussianBlur(noise, (7, 7), 0))[1].tobytes())


def with_wrong_bytes(data: bytes, count: int = 200) -> bytes:
    middle = len(data) // 2
    return data[:middle] + rng.bytes(count) + data[middle + count :]


def test_a_picture_with_wrong_bytes_in_its_middle_is_damaged_in_a_cameras_process(tmp_path: Path) -> None:
    is_hurt = [n % 3 == 2 for n in range(15)]
    for n, hurt in enumerate(is_hurt):
        (tmp_path / f"{n:02d}.jpg").write_bytes(with_wrong_bytes(picture()) if hurt else picture())
    shots: list[Shot] = []
    settings = CameraSettings(source=str(tmp_path), pace="max", policy="every")
    capture = Capture("top", settings, lambda _, shot: shots.append(shot), lambda _: None)
    capture.start()
    assert capture.ended.wait(30)
    capture.join(10)
    codes = [shot.frame.fault.code if shot.frame.fault else None for shot in shots]
    assert codes == ["F-DAMAGED" if hurt else None for hurt in is_hurt]


def test_control_where_nobody_listens_most_of_them_pass() -> None:
    faults = [decode_picture(with_wrong_bytes(picture(), 12), "c", n).fault for n in range(20)]
    assert faults.count(None) > 5


def test_a_camera_that_pads_all_its_pictures_is_left_alone_with_it() -> None:
    program = """
import cv2, numpy as np
from devices.sources.decoder_words import WORDS
from devices.sources.picture import decode_picture
WORDS.allow()
noise = np.random.default_rng(0).normal(110, 60, (120, 160, 3)).clip(0, 255).astype(np.uint8)
data = cv2.imencode(".jpg", cv2.GaussianBlur(noise, (7, 7), 0))[1].tobytes()
at = data.index(bytes([0xFF, 0xDB]))
padded = data[:at] + bytes(6) + data[at:]
print([decode_picture(padded, "c", n).fault is None for n in range(5)])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path.cwd())
    assert done.stdout.strip() == str([True] * 5), done.stdout + done.stderr
