"""What nobody may see is black before anything else looks at a frame; `mask: [[[0, 0], [200, 0], [200, 90]]]` in frame pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from devices.errors import CameraError
from devices.frame import Frame

Point = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
Polygon = Annotated[tuple[Point, ...], Field(min_length=3)]


class PrivacyMask:
    """Fills polygons with black, in the frame's own memory: no copy with what they hide exists afterwards."""

    def __init__(self, polygons: tuple[tuple[tuple[int, int], ...], ...]) -> None:
        self._polygons = [np.array(polygon, np.int32) for polygon in polygons]
        self._fits: tuple[int, int] | None = None

    def __call__(self, frame: Frame) -> Frame:
        """The frame without what is hidden.

        Raises:
            CameraError: C-MASK where a point lies outside the frame: the mask was drawn for another resolution and would hide nothing.
        """
        if not self._polygons or frame.fault is not None:
            return frame
        self._check(frame.image)
        if not (frame.image.flags.writeable and frame.image.flags.c_contiguous):
            frame = replace(frame, image=np.array(frame.image, order="C"))
        for polygon in self._polygons:
            cv2.fillPoly(frame.image, [polygon], (0, 0, 0))
        return frame

    def visible(self, height: int, width: int) -> NDArray[np.bool_] | None:
        """(height, width) True where a frame shows something; None where all of it does."""
        if not self._polygons:
            return None
        hidden = np.zeros((height, width), np.uint8)
        for polygon in self._polygons:
            cv2.fillPoly(hidden, [polygon], (1,))
        return np.asarray(hidden == 0)

    def _check(self, image: NDArray[np.uint8]) -> None:
        height, width = image.shape[:2]
        if self._fits == (height, width):
            return
        for number, polygon in enumerate(self._polygons):
            x, y = polygon.max(0)
            if x > width or y > height:
                raise CameraError(
                    "C-MASK", f"mask polygon {number} reaches to {x},{y}, but the frames are {width}x{height}"
                )
        self._fits = (height, width)
