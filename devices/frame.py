"""One picture from a camera, and the clockwork that paces recorded material."""
from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Frame:
    """`image`: (H, W, 3) uint8 BGR. `mono_s`: monotonic seconds at capture (wall time is the runtime's business)."""

    image: NDArray[np.uint8]
    index: int
    mono_s: float

    @classmethod
    def now(cls, image: NDArray[np.uint8], index: int) -> Frame:
        """A frame captured at this moment."""
        return cls(image, index, time.monotonic())


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
