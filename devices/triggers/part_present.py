"""A part enters the region and leaves it: one shot, of the frame in which the part was nearest the region's centre.

`trigger: {kind: part_present, region: [x, y, w, h]}`. For a fixed camera over a belt, tray or turntable whose look changes slowly:
what differs from a learned background is a part. The region must hold one part at a time; it may be narrower than a part,
since the part's centre is that of its whole outline inside the ROI.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from devices.errors import CameraError
from devices.frame import Frame, Roi
from devices.triggers.base import Shot, Trigger, TriggerSettings

WORK_PX = 160  # the ROI's longer side while looking for parts
ADAPT = 0.05  # share of the newest frame in the background, where no part is
GHOST_RATIO = (
    1.5  # an outline that is that much sharper in the background than in the frame was left by something that went away
)
EDGE_MARGIN_PX = 2

Gray = NDArray[np.float32]


class PartPresentSettings(TriggerSettings):
    """`region` (x, y, w, h) in frame pixels (default: the ROI). `threshold` in grey levels (above the depth of shadows); `min_area` as a share of the region.

    `settle_frames`: how many frames in a row must agree that a part is there, or gone. `absorb_frames`: a change of the scene
    that stays this long becomes background.
    """

    kind: Literal["part_present"] = "part_present"
    region: Roi | None = None
    threshold: int = Field(40, ge=1, le=254)
    min_area: float = Field(0.05, gt=0, le=1)
    settle_frames: int = Field(2, ge=1)
    absorb_frames: int = Field(3000, ge=1)


@dataclass(frozen=True)
class _Blob:
    """A part's outline in work pixels: bounding box (x, y, w, h) and mask."""

    box: tuple[int, int, int, int]
    mask: NDArray[np.uint8]


class PartPresentTrigger(Trigger):
    """Background difference on a small copy of the frame; a millisecond each."""

    Settings = PartPresentSettings
    settings: PartPresentSettings
    stands_for_part = True

    def __init__(self, settings: PartPresentSettings, roi: Roi | None) -> None:
        super().__init__(settings, roi)
        self._background: Gray | None = None
        self.reset()

    @property
    def present_id(self) -> int | None:
        return self._count + 1 if self._present else None

    def reset(self) -> None:
        self._present = False
        self._agreeing = 0
        self._best: Frame | None = None
        self._best_offset = float("inf")

    def update(self, frame: Frame) -> Shot | None:
        if frame.fault is not None:
            return None
        small = _shrink(frame.image)
        if self._background is None or self._background.shape != small.shape:
            self._background = small.copy()
        region = self._region(frame.image.shape, small.shape)
        blob = self._find(small, region)
        if blob is not None:
            self._remember(frame, blob, region)
        return self._settle(blob is not None)

    def _settle(self, seen: bool) -> Shot | None:
        """A change of state needs `settle_frames` in a row; the leaving of a part is the shot."""
        self._agreeing = 0 if seen == self._present else self._agreeing + 1
        if self._agreeing < self.settings.settle_frames:
            if not seen and not self._present:
                self._best, self._best_offset = None, float("inf")
            return None
        self._present, self._agreeing = seen, 0
        best = self._best
        if seen or best is None:
            return None
        self._best, self._best_offset = None, float("inf")
        return self._shot(best)

    def _remember(self, frame: Frame, blob: _Blob, region: Roi) -> None:
        x, y, w, h = blob.box
        left, top, width, height = region
        offset = float(np.hypot(x + w / 2 - left - width / 2, y + h / 2 - top - height / 2))
        if offset < self._best_offset:
            self._best, self._best_offset = frame, offset

    def _region(self, shape: tuple[int, ...], small: tuple[int, ...]) -> Roi:
        """The region in work pixels."""
        if self.settings.region is None:
            return 0, 0, small[1], small[0]
        left, top = (self.roi[0], self.roi[1]) if self.roi else (0, 0)
        x, y, w, h = self.settings.region
        if x < left or y < top or x + w > left + shape[1] or y + h > top + shape[0]:
            raise CameraError(
                "C-ROI", f"trigger.region {x},{y},{w},{h} does not lie inside the frame of {shape[1]}x{shape[0]}"
            )
        across, down = small[1] / shape[1], small[0] / shape[0]
        return round((x - left) * across), round((y - top) * down), max(1, round(w * across)), max(1, round(h * down))

    def _find(self, small: Gray, region: Roi) -> _Blob | None:
        """The largest part that reaches into the region; the background follows everywhere else."""
        background = self._background
        if background is None:
            return None
        gain = _gain(small, background)
        difference = np.abs(small - background * gain).max(2)
        changed = (difference > self.settings.threshold).astype(np.uint8)
        foreground = np.asarray(cv2.morphologyEx(changed, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)), np.uint8)
        # What a part covers cannot be learned from, but it darkens and brightens with everything else.
        background *= 1 + ADAPT * (gain - 1)
        self._adapt(small, background, foreground)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(foreground, connectivity=8)
        x, y, w, h = region
        inside = labels[y : y + h, x : x + w]
        found: _Blob | None = None
        largest = 0
        for label in range(1, count):
            area = int(stats[label, cv2.CC_STAT_AREA])
            if area < self.settings.min_area * w * h or area <= largest or not (inside == label).any():
                continue
            mask = (labels == label).astype(np.uint8)
            if _is_ghost(mask, small, background):
                background[mask > 0] = small[mask > 0]
                continue
            box = tuple(
                int(stats[label, n]) for n in (cv2.CC_STAT_LEFT, cv2.CC_STAT_TOP, cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT)
            )
            found, largest = _Blob((box[0], box[1], box[2], box[3]), mask), area
        return found

    def _adapt(self, small: Gray, background: Gray, foreground: NDArray[np.uint8]) -> None:
        rate = np.where(
            cv2.dilate(foreground, np.ones((5, 5), np.uint8)) > 0, 1.0 / self.settings.absorb_frames, ADAPT
        ).astype(np.float32)
        background += rate[..., None] * (small - background)


def _shrink(image: NDArray[np.uint8]) -> Gray:
    height, width = image.shape[:2]
    scale = min(1.0, WORK_PX / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image
    return np.asarray(cv2.GaussianBlur(small, (3, 3), 0), np.float32)


def _gain(small: Gray, background: Gray) -> float:
    """Brightness against the background: exposure that drifts as a whole is no part."""
    ratio = np.median((small.mean(2) + 1.0) / (background.mean(2) + 1.0))
    return float(np.clip(ratio, 0.5, 2.0))


def _is_ghost(mask: NDArray[np.uint8], small: Gray, background: Gray) -> bool:
    """Whether the outline is an edge of the background rather than of the frame: the part was there when the background was learned."""
    kernel = np.ones((2 * EDGE_MARGIN_PX + 1, 2 * EDGE_MARGIN_PX + 1), np.uint8)
    ring = (cv2.dilate(mask, kernel) - cv2.erode(mask, kernel)) > 0
    if not ring.any():
        return False  # it fills the picture
    return bool(_edges(background)[ring].mean() > GHOST_RATIO * _edges(small)[ring].mean() + 1.0)


def _edges(image: Gray) -> Gray:
    grey = image.mean(2)
    return np.asarray(np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)), np.float32)
