"""One picture from a camera, the clockwork that paces recorded material, and cutting out the region of interest."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from devices.errors import CameraError

Roi = tuple[int, int, int, int]


@dataclass(frozen=True)
class Fault:
    """Why a frame shows nothing usable; `code` is stable (F-DECODE), the text is for people."""

    code: str
    detail: str


@dataclass(frozen=True)
class Frame:
    """`image`: (H, W, 3) uint8 BGR, empty where `fault` is set. `mono_s`: monotonic seconds at capture (wall time is the runtime's business).

    `position_ms`: the stream's own time, where it has one.
    """

    image: NDArray[np.uint8]
    index: int
    mono_s: float
    fault: Fault | None = None
    position_ms: float | None = None

    @classmethod
    def now(cls, image: NDArray[np.uint8], index: int) -> Frame:
        """A frame captured at this moment."""
        return cls(image, index, time.monotonic())

    @classmethod
    def faulty(cls, code: str, detail: str, index: int) -> Frame:
        """A frame that could not be read."""
        return cls(np.zeros((0, 0, 3), np.uint8), index, time.monotonic(), Fault(code, detail))


@dataclass(frozen=True)
class Cropper:
    """Cuts the ROI (x, y, w, h) out of each frame, as a copy unless told otherwise; without a ROI the frame passes as it is."""

    roi: Roi | None
    copies: bool = True

    def __call__(self, frame: Frame) -> Frame:
        """Raises CameraError where the ROI does not lie inside the frame."""
        if self.roi is None or frame.fault is not None:
            return frame
        x, y, w, h = self.roi
        height, width = frame.image.shape[:2]
        if x + w > width or y + h > height:
            raise CameraError(
                "C-ROI", f"roi {x},{y},{w},{h} reaches to {x + w},{y + h}, but the frames are {width}x{height}"
            )
        cut = frame.image[y : y + h, x : x + w]
        return replace(frame, image=np.ascontiguousarray(cut) if self.copies else cut)


class Pacer:
    """Holds recorded frames back to their own rate; `fps=None` lets them run free."""

    def __init__(self, fps: float | None) -> None:
        self._period_s = 1.0 / fps if fps else 0.0
        self._next_s: float | None = None
        self._stopped = threading.Event()

    def wait(self) -> None:
        """Returns when the next frame is due. A late consumer is not asked to catch up: the schedule restarts from now."""
        if not self._period_s:
            return
        now_s = time.monotonic()
        if self._next_s is None or now_s > self._next_s + self._period_s:
            self._next_s = now_s
        self._stopped.wait(max(0.0, self._next_s - now_s))
        self._next_s += self._period_s

    def stop(self) -> None:
        """Ends a wait in another thread."""
        self._stopped.set()
