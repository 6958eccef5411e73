"""Small figures drawn by OpenCV alone: text, pictures, and axes with bands, steps and marks. Colours are BGR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

BLUE, AMBER, GREEN, RED, GREY = (182, 111, 59), (47, 128, 209), (96, 170, 60), (74, 72, 181), (110, 110, 110)
INK = (50, 50, 50)
SHARP = 4  # bits of a pixel's fraction, for smooth lines
LEVELS = 32  # per channel, so that the file stays small

Colour = tuple[int, int, int]
Anchor = Literal["start", "middle", "end"]


class Canvas:
    """A white picture of `width` x `height` pixels. Needs OpenCV 5, which brings a font."""

    def __init__(self, width: int, height: int) -> None:
        self.image = np.full((height, width, 3), 255, np.uint8)
        self._font = cv2.FontFace("sans")

    def text(
        self, text: str, at: tuple[float, float], colour: Colour = INK, anchor: Anchor = "start", size_px: int = 13
    ) -> None:
        """The base line's start, middle or end lies at `at`."""
        box = cv2.getTextSize((10_000, 10_000), text, (0, 0), self._font, size_px, 400)
        shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * box[2]
        cv2.putText(self.image, text, (round(at[0] - shift), round(at[1])), colour, self._font, size_px, 400)

    def paste(self, picture: NDArray[np.uint8], at: tuple[int, int]) -> None:
        """A picture (H, W, 3) with its upper left corner at `at`."""
        left, top = at
        coarse = (picture // (256 // LEVELS)) * (256 // LEVELS) + 128 // LEVELS
        self.image[top : top + picture.shape[0], left : left + picture.shape[1]] = coarse

    def save(self, path: Path) -> None:
        """As a PNG."""
        cv2.imwrite(str(path), self.image, [cv2.IMWRITE_PNG_COMPRESSION, 9])


@dataclass(frozen=True)
class Axes:
    """A plot inside `box` (left, top, width, height) of a canvas."""

    canvas: Canvas
    box: tuple[int, int, int, int]
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """Pixels (n, 2) of points; what lies outside is brought to the border."""
        left, top, width, height = self.box
        across = np.clip((np.asarray(x, float) - self.x[0]) / (self.x[1] - self.x[0]), 0, 1)
        up = np.clip((np.asarray(y, float) - self.y[0]) / (self.y[1] - self.y[0]), 0, 1)
        return np.stack(np.broadcast_arrays(left + across * width, top + (1 - up) * height), -1)

    def fill(self, x: ArrayLike, y: ArrayLike, colour: Colour) -> None:
        """A curve with the area below it tinted."""
        points = self.at(x, y)
        ends = self.at([np.asarray(x)[-1], np.asarray(x)[0]], [self.y[0], self.y[0]])
        self._tint(np.concatenate([points, ends]), colour, 0.2)
        self._lines(points, colour)

    def band(
        self, x: Sequence[float], low: NDArray[np.float64], high: NDArray[np.float64], colour: Colour = BLUE
    ) -> None:
        """Between two staircases that change at each x."""
        over, under = self._staircase(x, high), self._staircase(x, low)
        self._tint(np.concatenate([over, under[::-1]]), colour, 0.18)

    def steps(self, x: Sequence[float], y: NDArray[np.float64], colour: Colour) -> None:
        """A staircase that changes at each x."""
        self._lines(self._staircase(x, y), colour)

    def vertical(self, x: float, colour: Colour, label: str) -> None:
        """A dashed line."""
        (left, bottom), (_, top) = self.at([x, x], self.y)
        for y in np.arange(top, bottom, 8):
            cv2.line(self.canvas.image, (round(left), round(y)), (round(left), round(min(y + 4, bottom))), colour, 1)
        self.canvas.text(label, (left + 5, top + 12), colour=colour)

    def horizontal(self, y: float, colour: Colour, label: str) -> None:
        """A dashed line, named at its right end."""
        (left, height), (right, _) = self.at(self.x, [y, y])
        for x in np.arange(left, right, 8):
            cv2.line(self.canvas.image, (round(x), round(height)), (round(min(x + 4, right)), round(height)), colour, 1)
        self.canvas.text(label, (right - 4, height - 5), colour=colour, anchor="end")

    def frame(self, x_ticks: Sequence[float], y_ticks: Sequence[float], label: str) -> None:
        """Base line, ticks and the name of the axes."""
        left, top, width, height = self.box
        cv2.line(self.canvas.image, (left, top + height), (left + width, top + height), INK, 1)
        for tick in x_ticks:
            across = self.at(tick, self.y[0])[0]
            cv2.line(self.canvas.image, (round(across), top + height), (round(across), top + height + 3), INK, 1)
            self.canvas.text(f"{tick:g}", (across, top + height + 17), colour=GREY, anchor="middle", size_px=12)
        for tick in y_ticks:
            up = self.at(self.x[0], tick)[1]
            self.canvas.text(f"{tick:.0%}", (left - 8, up + 4), colour=GREY, anchor="end", size_px=12)
        self.canvas.text(label, (left + width, top + height + 34), colour=GREY, anchor="end", size_px=12)

    def _staircase(self, x: Sequence[float], y: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.at(np.repeat(np.asarray(x), 2)[1:], np.repeat(np.asarray(y), 2)[:-1])

    def _lines(self, points: NDArray[np.float64], colour: Colour) -> None:
        sharp = np.round(points * (1 << SHARP)).astype(np.int32)
        cv2.polylines(self.canvas.image, [sharp], False, colour, 1, cv2.LINE_AA, SHARP)

    def _tint(self, points: NDArray[np.float64], colour: Colour, share: float) -> None:
        over = self.canvas.image.copy()
        cv2.fillPoly(over, [np.round(points * (1 << SHARP)).astype(np.int32)], colour, cv2.LINE_AA, SHARP)
        cv2.addWeighted(over, share, self.canvas.image, 1 - share, 0, self.canvas.image)
