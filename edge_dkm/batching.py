"""Whether frames of several cameras go through their model in one run: only where that was measured to be faster, before the first shot.

Cameras share runs where they share a loaded model and a codebook. Thresholds and labels stay each camera's own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np

from devices.settings import CameraSettings
from edge_dkm.errors import InspectionError
from edge_dkm.inspector import FETCHED, Inspector

MAX_BATCH = 4  # a result waits for the whole run; more frames than this were never faster on a processor
ROUNDS = 5
WORTH = 0.95  # one run must take less than this share of the time of single runs
MEASURE_S = 1.0  # of the start of a line, for each model and frame size

Shape = tuple[int, ...]

log = logging.getLogger(__name__)


class Batching:
    """How many waiting frames of a camera's size and model may share a run; 1 where sharing is not faster, or not known to be."""

    def __init__(self, cameras: Mapping[str, CameraSettings], inspectors: Mapping[str, Inspector]) -> None:
        self._cameras, self._inspectors = cameras, inspectors
        self._groups: list[list[str]] = []
        for name, inspector in inspectors.items():
            for group in self._groups:
                if inspectors[group[0]].shares_runs_with(inspector):
                    group.append(name)
                    break
            else:
                self._groups.append([name])
        self._group_of = {name: n for n, group in enumerate(self._groups) for name in group}
        self._limits: dict[tuple[int, Shape], int] = {}

    def measure(self) -> None:
        """Compares runs of several frames with single runs, for every frame size that is known before the first frame."""
        for n, group in enumerate(self._groups):
            shapes = [shape for name in group if (shape := self._shape(name)) is not None]
            for shape in sorted({shape for shape in shapes if shapes.count(shape) > 1}):
                most = min(shapes.count(shape), MAX_BATCH)
                self._limits[n, shape] = self._measured(self._inspectors[group[0]], shape, most)

    def limit(self, camera: str, shape: Shape) -> int:
        """The most frames of this shape that may go in one run with one of this camera."""
        return self._limits.get((self._group_of[camera], shape), 1)

    def shares(self, camera: str, other: str) -> bool:
        """Whether the two cameras' frames may go in one run."""
        return self._group_of[camera] == self._group_of[other]

    def stop(self, camera: str, why: InspectionError) -> None:
        """From now on this camera's model takes one frame at a time."""
        for key in [key for key in self._limits if key[0] == self._group_of[camera]]:
            if self._limits[key] > 1:
                log.warning("frames are inspected one by one from now on: a run of several failed: %s", why)
            self._limits[key] = 1

    def _shape(self, camera: str) -> Shape | None:
        """Of the frames that are to come: the ROI's, else the graph's, else the training's (another is refused with `framing: same`)."""
        settings, spec = self._cameras[camera], self._inspectors[camera].metadata.input
        if settings.roi is not None:
            return settings.roi[3], settings.roi[2], 3
        if spec.h and spec.w:
            return spec.h, spec.w, 3
        if spec.frame is not None and settings.framing == "same":
            return spec.frame[1], spec.frame[0], 3
        return None

    def _measured(self, inspector: Inspector, shape: Shape, most: int) -> int:
        """The largest number of frames up to `most` that is faster in one run."""
        ratios = measure_ratios(inspector, shape, most)
        limit = max((n for n, ratio in ratios.items() if ratio < WORTH), default=1)
        log.info(
            "%s, frames of %dx%d from several cameras: %s (time of one run / of single runs: %s)",
            inspector.file.name,
            shape[1],
            shape[0],
            f"up to {limit} in one run" if limit > 1 else "one by one, since that is as fast",
            ", ".join(f"{n} frames {ratio:.2f}" for n, ratio in ratios.items()) or "not measured",
        )
        return limit


def measure_ratios(inspector: Inspector, shape: Shape, most: int) -> dict[int, float]:
    """Time of one run of n frames / time of n single runs, for n from 2 to `most`; the two take turns. Empty where the model fails."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (most, *shape), dtype=np.uint8)
    taken: dict[int, tuple[list[float], list[float]]] = {n: ([], []) for n in range(2, most + 1)}
    deadline_s = time.monotonic() + MEASURE_S
    try:
        for _ in range(ROUNDS + 1):
            for n, (together, single) in taken.items():
                started_s = time.perf_counter()
                inspector.run(np.stack(list(images[:n])), FETCHED)
                together.append(time.perf_counter() - started_s)
                started_s = time.perf_counter()
                for image in images[:n]:
                    inspector.run(image[None], FETCHED)
                single.append(time.perf_counter() - started_s)
            if time.monotonic() > deadline_s:
                break
    except InspectionError as error:
        log.warning("%s takes one frame at a time: %s", inspector.file.name, error)
        return {}
    return {n: _median(together[1:]) / _median(single[1:]) for n, (together, single) in taken.items() if single[1:]}


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
