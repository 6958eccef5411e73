"""How a picture is, apart from what it shows: light, contrast, focus, position. The exporter measures the reference with the same code.

Focus is the energy of differences between neighbours against that of pixels four apart, on a logarithmic scale: both rise with the
square of light and contrast, so their ratio does not follow those, and blur takes the finest detail first (a structure-function form
of the ratios that Pertuz, Puig and Garcia 2013, "Analysis of focus measure operators", compare).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

THUMBNAIL_PX = 32
FAR_PX = 4  # differences over so many pixels outlast a slight blur
FLAT = 1e-3  # squared grey levels: less is no structure at all
FLAT_DEVIATION = 0.5  # grey levels of a thumbnail
MIN_SIDE_PX = 8
BRIGHT = 240  # from this grey level on a pixel counts as bright
MIN_BRIGHT_PX = 16  # with fewer, their share says nothing

Thumbnail = NDArray[np.float32]
Moments = tuple[float, float, float]


@dataclass(frozen=True)
class Quality:
    """light: mean grey level; contrast: its standard deviation; thumbnail: (32, 32) grey levels.

    burnt: share of the bright pixels that stand at the end of the scale; focus: see the module, the lower the less.
    """

    light: float
    contrast: float
    burnt: float
    focus: float
    thumbnail: Thumbnail


def measure(image: NDArray[np.uint8]) -> Quality:
    """Of one picture (H, W, 3) BGR or (H, W) uint8."""
    grey = np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), np.uint8) if image.ndim == 3 else image
    mean, deviation = cv2.meanStdDev(grey)
    small = cv2.resize(grey, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA)
    return Quality(
        float(mean[0, 0]),
        float(deviation[0, 0]),
        _burnt(grey),
        _focus(grey),
        np.asarray(small, np.float32),
    )


def offset(thumbnail: Thumbnail, reference: Thumbnail) -> tuple[float, float]:
    """How far the picture has moved against the reference: (right, down) in shares of width and height, by phase correlation.

    Of pictures that share no fixed scene this is noise, and so is the reference's own spread, against which it is judged.
    """
    window = cv2.createHanningWindow((THUMBNAIL_PX, THUMBNAIL_PX), cv2.CV_32F)
    moved, still = (np.asarray(picture - picture.mean(), np.float32) for picture in (thumbnail, reference))
    if min(float(still.std()), float(moved.std())) < FLAT_DEVIATION:
        return 0.0, 0.0
    (right, down), _ = cv2.phaseCorrelate(still, moved, window)
    return float(right) / THUMBNAIL_PX, float(down) / THUMBNAIL_PX


def _burnt(grey: NDArray[np.uint8]) -> float:
    """More light cannot make a white surface brighter, but it takes its texture: light and contrast of black and white parts stay."""
    bright = np.count_nonzero(grey >= BRIGHT)
    return float(np.count_nonzero(grey == 255) / bright) if bright >= MIN_BRIGHT_PX else 0.0


def _focus(grey: NDArray[np.uint8]) -> float:
    if min(grey.shape) < MIN_SIDE_PX:
        return 0.0
    near, far = _difference(grey, 1), _difference(grey, FAR_PX)
    return float(np.log((near + FLAT) / (far + FLAT)))


def _difference(grey: NDArray[np.uint8], lag_px: int) -> float:
    """Mean squared difference of pixels `lag_px` apart, over both directions."""
    along = cv2.norm(grey[:, lag_px:], grey[:, :-lag_px], cv2.NORM_L2SQR) / grey[:, lag_px:].size
    down = cv2.norm(grey[lag_px:], grey[:-lag_px], cv2.NORM_L2SQR) / grey[lag_px:].size
    return float(along + down)
