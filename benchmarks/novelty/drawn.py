"""Drawn parts of the synthetic belt, cut out as a line's region would, with the place of each defect. No camera, no real image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from devices.sources.synthetic import HEIGHT_PX, SPRITE_PX, WIDTH_PX, Conveyor, ConveyorOptions

REGION_PX = 160
VISIBLE = 12  # grey levels from which on a defect changes a pixel


@dataclass(frozen=True)
class DrawnPart:
    """`image` (160, 160, 3) uint8 BGR; `defect`: None, scratch, stain or foreign; `mask` (160, 160): where it is."""

    image: NDArray[np.uint8]
    defect: str | None
    mask: NDArray[np.bool_]


def drawn_parts(options: ConveyorOptions) -> Iterator[DrawnPart]:
    """Every part of the plan when it is nearest to the middle of the picture."""
    conveyor, flawless = Conveyor(options), Conveyor(options)
    flawless.plan = [replace(part, defect=None) for part in conveyor.plan]
    for part in conveyor.plan:
        start = WIDTH_PX + SPRITE_PX / 2 + (part.number - 1) * options.spacing_px
        frame = math.ceil((start - WIDTH_PX / 2) / options.speed_px)
        image = _region(conveyor.render(frame))
        if part.defect is None:
            yield DrawnPart(image, None, np.zeros(image.shape[:2], bool))
            continue
        apart = np.abs(image.astype(np.int16) - _region(flawless.render(frame)))
        yield DrawnPart(image, part.defect, apart.max(2) >= VISIBLE)


def _region(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    top, left = (HEIGHT_PX - REGION_PX) // 2, (WIDTH_PX - REGION_PX) // 2
    return np.ascontiguousarray(frame[top : top + REGION_PX, left : left + REGION_PX])
