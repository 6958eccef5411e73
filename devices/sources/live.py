"""The reading loop that live cameras share: frames until it is closed, an error when the camera stops giving them."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np

from devices.errors import CameraError
from devices.frame import Frame


class LiveCapture:
    """Frames of an opened `capture`; `lost` is the text of the error that ends them."""

    live = True

    def __init__(self, capture: cv2.VideoCapture, lost: str) -> None:
        self._capture, self._lost, self._closed = capture, lost, False

    def __iter__(self) -> Iterator[Frame]:
        index = 0
        try:
            while not self._closed:
                ok, image = self._capture.read()
                if not ok:
                    if not self._closed:
                        raise CameraError("C-LOST", self._lost)
                    break
                yield Frame.now(np.asarray(image, np.uint8), index)
                index += 1
        finally:
            self._capture.release()  # a device that is held cannot be opened again

    def close(self) -> None:
        self._closed = True
