"""A film as a camera; `source: file:line.mp4`, or the bare path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from devices.errors import CameraError
from devices.frame import Frame, Pacer
from devices.settings import CameraSettings

DEFAULT_FPS = 25.0


class FileSource:
    """The frames of a film in order, at its own rate unless `pace: max`; ends with it unless `loop`."""

    kind = "file"
    live = False

    def __init__(self, path: str, settings: CameraSettings) -> None:
        if not Path(path).is_file():
            raise CameraError("C-NODEV", f"film {path} does not exist (looked in {Path.cwd()})")
        self._path, self._loop = path, settings.loop
        self._capture = self._open()
        fps = settings.fps or self._capture.get(cv2.CAP_PROP_FPS) or DEFAULT_FPS
        self._pacer = Pacer(fps if settings.pace == "source" else None)
        self._closed = False

    def _open(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture(self._path, cv2.CAP_FFMPEG)
        if not capture.isOpened():
            raise CameraError("C-OPEN", f"{self._path} is no film that OpenCV can open")
        return capture

    def __iter__(self) -> Iterator[Frame]:
        index = 0
        while not self._closed:
            ok, image = self._capture.read()
            if not ok:
                if not self._loop or index == 0:
                    break
                self._capture.release()
                self._capture = self._open()
                continue
            self._pacer.wait()
            yield Frame.now(np.asarray(image, np.uint8), index)
            index += 1
        self._capture.release()

    def close(self) -> None:
        self._closed = True
        self._pacer.stop()
