"""Keeps frames that the next training should see: novel ones, borderline ones and a few ordinary ones, per camera, within bounds.

A follower (edge_dkm/afterwards.py): PNGs are encoded and written on its thread. `<state>/frames/<camera>/` has the layout of `edge-dkm record`,
so the trainer reads it as it stands. Frames come from the camera with the privacy mask applied (devices/privacy.py); nothing here has seen more.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_dkm.clock import is_synced, wall_s
from edge_dkm.frames.index import FrameRow, frame_name
from edge_dkm.frames.ring import FrameRing, ModelSpace, RingLimits, ring_folders
from edge_dkm.inspector import Inspection, Inspector
from edge_dkm.pipeline import Outcome
from edge_dkm.results import Case
from edge_dkm.settings import FramesSettings, LineSettings

FOLDER = "frames"
TRIM_EVERY_S = 60.0
RETRY_S = 60.0  # after the disk failed
RESERVE_BYTES = 100_000_000  # left to the outbox and everybody else
BURST_S = 300.0  # a kind may use up so much of its hourly number at once

Kind = Literal["novel", "borderline", "ordinary"]
FrameSize = Callable[[str], tuple[int, int] | None]
log = logging.getLogger(__name__)


class NovelFrames:
    """The rings of all cameras of a line.

    Args:
        frames: the folder of all rings; made when the first part has passed.
        spaces: by camera, whose embeddings are kept.
        frame_size: (w, h) of a camera's uncropped frames, where it is known.
    """

    def __init__(
        self, settings: LineSettings, frames: Path, spaces: Mapping[str, ModelSpace], frame_size: FrameSize
    ) -> None:
        self._settings, self._cameras = settings.frames, settings.cameras
        self._frames, self._spaces, self._frame_size = frames, spaces, frame_size
        self._chooser = Chooser(settings.frames)
        self._run = f"{int(wall_s() * 1000):x}"  # triggers are counted from 1 in every run
        self._rings: dict[str, FrameRing] = {}
        self._is_open = False
        self._problem: str | None = None
        self._retry_s = self._trim_due_s = 0.0
        self.kept: Counter[str] = Counter()

    def wants_image(self, outcome: Outcome) -> bool:
        """Whether it is a frame to keep."""
        return self._chooser.chooses(outcome)

    def follow(self, outcome: Outcome) -> None:
        """Keeps the frame where it was chosen; removes what is over the limits now and then. A disk that fails is said once."""
        now_s = time.monotonic()
        if now_s < self._retry_s:
            return
        try:
            if not self._is_open:
                self._open()
            inspection, image = outcome.inspection, outcome.image
            if inspection is not None and image is not None and self._has_room():
                self._keep(outcome.case, inspection, image)
                self.kept[kind_of(inspection, self._settings)] += 1
                self._well()
            if now_s >= self._trim_due_s:
                self._trim_due_s = now_s + TRIM_EVERY_S
                for ring in self._rings.values():
                    _trim(ring)
        except OSError as error:
            self._retry_s = now_s + RETRY_S
            self._say(f"S-IO {self._frames}: {error.strerror or error}; no frames are kept until that is mended")

    def close(self) -> None:
        """Nothing comes after this."""
        for ring in self._rings.values():
            ring.close()

    def _open(self) -> None:
        """Also the folders of cameras that the line no longer has: what is too old goes there, too."""
        limits = RingLimits(self._settings.max_mb * 1e6, self._settings.max_age_h * 3600)
        names = {path.name for path in ring_folders(self._frames)}
        for name in sorted(names | (set(self._cameras) if self._settings.keep != "never" else set())):
            if name not in self._rings:
                self._rings[name] = FrameRing(self._frames / name, limits, self._spaces.get(name))
        self._is_open = True

    def _keep(self, case: Case, inspection: Inspection, image: NDArray[np.uint8]) -> None:
        done, png = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        if not done:
            raise OSError(f"a frame of {image.shape} could not be written as PNG")
        ring = self._rings[case.camera]
        height, width = image.shape[:2]
        ring.add(self._row(case, inspection, (width, height)), np.asarray(png).tobytes(), inspection.embedding)
        if ring.is_over:
            _trim(ring)

    def _row(self, case: Case, inspection: Inspection, size: tuple[int, int]) -> FrameRow:
        roi = self._cameras[case.camera].roi
        full = size if roi is None else self._frame_size(case.camera)
        return FrameRow(
            file=frame_name(case.camera, case.ts, case.result_id),
            camera=case.camera,
            ts=case.ts,
            group=case.part.id if case.part is not None else f"{self._run}-{case.trigger.id}",
            result_id=case.result_id,
            cluster=inspection.cluster.name,
            novelty_score=f"{inspection.novelty_score:.6g}",
            verdict=inspection.verdict,
            roi=" ".join(map(str, roi or (0, 0, *size))),
            frame="" if full is None else f"{full[0]}x{full[1]}",
        )

    def _has_room(self) -> bool:
        info = os.statvfs(self._frames)
        if info.f_bavail * info.f_frsize >= RESERVE_BYTES:
            return True
        self._say(
            f"S-FULL {self._frames}: less than {RESERVE_BYTES / 1e6:.0f} MB free; no frames are kept until there is more"
        )
        return False

    def _say(self, problem: str) -> None:
        if problem != self._problem:
            log.warning("%s", problem)
        self._problem = problem

    def _well(self) -> None:
        if self._problem is not None:
            log.info("%s: frames are kept again", self._frames)
        self._problem = None


def _trim(ring: FrameRing) -> None:
    ring.trim(wall_s(), is_clock_sure=is_synced() is not False)


def spaces_of(inspectors: Mapping[str, Inspector]) -> dict[str, ModelSpace]:
    """By camera: the model whose embeddings are kept."""
    return {
        name: ModelSpace(inspector.file.sha256, inspector.metadata.embed_dim) for name, inspector in inspectors.items()
    }


class Chooser:
    """Which parts' frames are kept: by novelty_score / threshold, at most `per_hour` of each kind and camera, else by chance."""

    def __init__(self, settings: FramesSettings, draw: Callable[[], float] = random.random) -> None:
        self._settings, self._draw = settings, draw
        self._budgets: dict[tuple[str, Kind], _Budget] = {}

    def chooses(self, outcome: Outcome) -> bool:
        """Decides it, once for each part."""
        if outcome.inspection is None or outcome.image is None or self._settings.keep == "never":
            return False
        kind = kind_of(outcome.inspection, self._settings)
        if kind == "ordinary" and self._draw() >= self._settings.ordinary:
            return False
        budget = self._budgets.setdefault((outcome.case.camera, kind), _Budget(self._settings.per_hour))
        return budget.spend(time.monotonic())


def kind_of(inspection: Inspection, settings: FramesSettings) -> Kind:
    """As what a part with this answer would be kept."""
    if inspection.is_novel:
        return "novel"
    low, high = settings.borderline
    if settings.keep == "borderline" and low <= inspection.novelty_score / inspection.novelty_threshold <= high:
        return "borderline"
    return "ordinary"


class _Budget:
    """So many an hour, and no more than a few minutes' worth at once."""

    def __init__(self, per_hour: float) -> None:
        self._per_s = per_hour / 3600
        self._most = max(1.0, self._per_s * BURST_S)
        self._left, self._since_s = self._most, time.monotonic()

    def spend(self, now_s: float) -> bool:
        """Takes one where there is one."""
        self._left = min(self._most, self._left + (now_s - self._since_s) * self._per_s)
        self._since_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True
