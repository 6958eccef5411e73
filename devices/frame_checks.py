"""Frames that show nothing usable although they came: dark, saturated, without contrast, frozen, stale, too large.

Such a frame becomes a faulty one, which ends in a declared bad_frame, never in a cluster. All but the frozen test look at a grid of at
most 1,600 points.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from configs import Settings
from devices.frame import Fault, Frame
from devices.privacy import PrivacyMask

MAX_PIXELS = 100_000_000  # more is a broken header or an attack on the memory, not a camera
GRID = 40  # points along each side, at most
OUTLIERS = 0.01  # share of the points that a burnt-in clock or dead pixels may take
COMPARED_BYTES = 1 << 18  # of a frame, by the frozen test: every n-th row
LIVE_FROZEN_FRAMES = (
    50  # two seconds at 25 frames/s; compressed streams of a still scene may repeat a frame a few times
)
BAR_LEVELS, BAR_SPREAD, BAR_ROWS = 3, 100, 0.6  # a test card's columns, in its upper part
BAR_COLUMNS = 0.95  # those at the edges of bars may flicker
LAG_WINDOW_S = 300.0  # clocks of camera and computer may drift apart over longer times

Levels = tuple[NDArray[np.intp], NDArray[np.intp]]


class CheckSettings(Settings):
    """Limits in grey levels; 0 switches a test off (`bright`: 255).

    `frozen_frames`: so many identical frames in a row (default: 50 for live cameras, off for recorded material). `dark`: 99 % of the
    picture below; `bright`: 99 % above; `flat`: 99 % within so many levels, in every colour, or a test card. `stale_ms`: how far a stream
    may fall behind (only where it has time stamps: rtsp). `damaged`: JPEG pictures whose end is missing.
    """

    frozen_frames: int | None = Field(None, ge=0)
    dark: int = Field(8, ge=0, le=255)
    bright: int = Field(250, ge=0, le=255)
    flat: int = Field(2, ge=0, le=255)
    stale_ms: int = Field(2000, ge=0)
    damaged: bool = True


class FrameChecks:
    """The tests of one stream, in the order in which a fault is named: too large, dark, bright, flat, frozen, stale."""

    def __init__(self, settings: CheckSettings, hidden: PrivacyMask, *, live: bool) -> None:
        self._settings, self._hidden = settings, hidden
        given = settings.frozen_frames
        self._frozen_frames = (LIVE_FROZEN_FRAMES if live else 0) if given is None else given
        self._visible: NDArray[np.bool_] | None = None
        self._shape: tuple[int, ...] = ()
        self._last_rows = b""
        self._same = 0
        self._last_position_ms: float | None = None
        self._lags: deque[tuple[float, float]] = (
            deque()
        )  # (time, lag in ms), rising in both: the smallest of the window is first

    def __call__(self, frame: Frame) -> Frame:
        """The frame, or a faulty one in its place."""
        if frame.fault is not None:
            return frame
        fault = self._too_large(frame) or self._first_of(frame)
        return replace(frame, image=np.zeros((0, 0, 3), np.uint8), fault=fault) if fault else frame

    def _first_of(self, frame: Frame) -> Fault | None:
        # Every test that remembers something sees every frame.
        frozen, stale = self._frozen(frame.image), self._stale(frame)
        return self._levels(frame.image) or frozen or stale

    def _too_large(self, frame: Frame) -> Fault | None:
        height, width = frame.image.shape[:2]
        if 0 < height * width <= MAX_PIXELS:
            return None
        return Fault("F-TOO-LARGE", f"the frame is {width}x{height}, expected 1 to {MAX_PIXELS} pixels")

    def _levels(self, image: NDArray[np.uint8]) -> Fault | None:
        limits = self._settings
        height, width = image.shape[:2]
        down, across = -(-height // GRID), -(-width // GRID)
        grid = image[::down, ::across]
        if image.shape != self._shape:
            self._shape = image.shape
            visible = self._hidden.visible(height, width)
            self._visible = None if visible is None else visible[::down, ::across]
        points = grid.reshape(-1, 3) if self._visible is None else grid[self._visible]
        if not len(points):
            return None  # the mask hides every point
        low, high = _spread(points)
        if high.max() < limits.dark:
            return Fault(
                "F-DARK", f"99 % of the frame is darker than grey level {high.max() + 1}, expected {limits.dark}"
            )
        if low.min() > limits.bright:
            return Fault(
                "F-BRIGHT", f"99 % of the frame is brighter than {low.min() - 1}, expected at most {limits.bright}"
            )
        if limits.flat and (high - low).max() < limits.flat:
            return Fault(
                "F-FLAT", f"the frame has {(high - low).max() + 1} grey levels, expected more than {limits.flat}"
            )
        if limits.flat and self._visible is None and _is_test_card(grid):
            return Fault("F-FLAT", "the frame is a test card: vertical bars without any structure")
        return None

    def _frozen(self, image: NDArray[np.uint8]) -> Fault | None:
        if not self._frozen_frames:
            return None
        rows = image[:: max(1, -(-image.nbytes // COMPARED_BYTES))].tobytes()
        self._same = self._same + 1 if rows == self._last_rows else 1
        self._last_rows = rows
        if self._same < self._frozen_frames:
            return None
        return Fault("F-FROZEN", f"{self._same} identical frames in a row, expected fewer than {self._frozen_frames}")

    def _stale(self, frame: Frame) -> Fault | None:
        """A stream's own time against ours; the smallest lag of the last minutes counts as none."""
        position_ms, limit_ms = frame.position_ms, self._settings.stale_ms
        if position_ms is None or not limit_ms:
            return None
        last_ms, self._last_position_ms = self._last_position_ms, position_ms
        if last_ms is not None and position_ms <= last_ms:
            self._lags.clear()
            change = "repeats" if position_ms == last_ms else "goes back"
            return Fault("F-STALE", f"the stream's time {change}: {position_ms:.0f} ms after {last_ms:.0f} ms")
        lag_ms = frame.mono_s * 1000 - position_ms
        while self._lags and self._lags[-1][1] >= lag_ms:
            self._lags.pop()
        self._lags.append((frame.mono_s, lag_ms))
        while self._lags[0][0] < frame.mono_s - LAG_WINDOW_S:
            self._lags.popleft()
        age_ms = lag_ms - self._lags[0][1]
        if age_ms <= limit_ms:
            return None
        return Fault("F-STALE", f"the frame is {age_ms:.0f} ms old, expected at most {limit_ms} ms")


def _spread(points: NDArray[np.uint8]) -> Levels:
    """The lowest and the highest level of each colour, without the outliers. `points` (n, 3)."""
    outliers = int(len(points) * OUTLIERS)
    bounds = outliers, len(points) - 1 - outliers
    parted = np.partition(np.ascontiguousarray(points.T), bounds, axis=1)
    return parted[:, bounds[0]].astype(np.intp), parted[:, bounds[1]].astype(np.intp)


def _is_test_card(grid: NDArray[np.uint8]) -> bool:
    """Colour bars: columns that are the same from top to bottom, and differ much from one another. No sensor gives that."""
    upper = grid[: int(len(grid) * BAR_ROWS)]
    if len(upper) < GRID // 4 or upper.shape[1] < GRID // 4:
        return False
    first, last = upper[0].astype(np.intp), upper[-1]
    least = BAR_COLUMNS * len(first)
    if np.count_nonzero(np.abs(first - last).max(1) <= BAR_LEVELS) < least:
        return False  # nearly every picture ends here
    steady = (np.ptp(upper, axis=0) <= BAR_LEVELS).all(1)
    return bool(np.count_nonzero(steady) >= least and np.ptp(first, axis=0).max() >= BAR_SPREAD)
