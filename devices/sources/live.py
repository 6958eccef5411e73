"""The reading loop that live cameras share: frames until it is closed, an error when the camera stops giving them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import cv2
import numpy as np

from devices.errors import CameraError
from devices.frame import Frame
from devices.sources.picture import decode_picture


class LiveCapture:
    """Frames of an opened `capture`; `lost` is the text of the error that ends them.

    A subclass may set `has_time` (the backend tells the stream's own time) and `gives_jpeg` (undecoded pictures, named by `shown`).
    """

    live = True
    has_time = gives_jpeg = False
    check_damage = True
    shown = ""

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
                yield self._frame(image, index)
                index += 1
        finally:
            self._capture.release()  # a device that is held cannot be opened again

    def _frame(self, image: cv2.typing.MatLike, index: int) -> Frame:
        if self.gives_jpeg:
            return decode_picture(np.asarray(image).tobytes(), self.shown, index, check_damage=self.check_damage)
        frame = Frame.now(np.asarray(image, np.uint8), index)
        return replace(frame, position_ms=self._capture.get(cv2.CAP_PROP_POS_MSEC)) if self.has_time else frame

    def close(self) -> None:
        self._closed = True
