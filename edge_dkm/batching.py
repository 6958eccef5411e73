"""Whether frames of several cameras go through their model in one run: only where that was measured to be faster, before the first shot.

Cameras share runs where they share a loaded model and a codebook. Thresholds and labels stay each camera's own. `measure_limits` belongs to
the loading of a line, which may take its time; `Batching` is what the running line asks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from devices.settings import CameraSettings
from edge_dkm.errors import FrameError, InspectionError
from edge_dkm.inspector import Inspector
from edge_dkm.paired_runs import paired_ms
from edge_dkm.runtime import COMPILING

MAX_BATCH = 4  # a result waits for the whole run; more frames than this were never faster on a processor
ROUNDS, MIN_ROUNDS = 5, 3
WORTH = 0.95  # one run must take less than this share of the time of single runs
MEASURE_S = 1.0  # of the start of a line, for each model and frame size

Shape = tuple[int, ...]
Limits = Mapping[tuple[str, Shape], int]  # by camera and shape of its frames

log = logging.getLogger(__name__)


class Batching:
    """How many waiting frames of a camera's size and model may share a run; 1 where sharing is not faster, or not known to be."""

    def __init__(self, inspectors: Mapping[str, Inspector]) -> None:
        self._inspectors = inspectors
        self._limits: dict[tuple[str, Shape], int] = {}

    def allow(self, limits: Limits) -> None:
        """What `measure_limits` found, before the first frame."""
        self._limits = dict(limits)

    def limit(self, camera: str, shape: Shape) -> int:
        """The most frames of this shape that may go in one run with one of this camera."""
        return self._limits.get((camera, shape), 1)

    def shares(self, camera: str, other: str) -> bool:
        """Whether the two cameras' frames may go in one run."""
        return self._inspectors[camera].shares_runs_with(self._inspectors[other])

    def stop(self, camera: str, why: InspectionError) -> None:
        """From now on this camera's model takes one frame at a time; but a frame that is none speaks against nothing."""
        if isinstance(why, FrameError):
            return
        sharing = [key for key, limit in self._limits.items() if limit > 1 and self.shares(camera, key[0])]
        if sharing:
            log.warning("frames are inspected one by one from now on: a run of several failed: %s", why)
        for key in sharing:
            self._limits[key] = 1


def measure_limits(
    cameras: Mapping[str, CameraSettings],
    inspectors: Mapping[str, Inspector],
    tell: Callable[[str, str], None] | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Limits:
    """Compares runs of several frames with single runs, for every frame size that is known before the first frame.

    Args:
        tell: is called with (code, detail) when a measurement begins.
        is_stopped: ends it early.
    """
    limits: dict[tuple[str, Shape], int] = {}
    for group in _groups(inspectors):
        first = inspectors[group[0]]
        if _compiles_per_shape(first):
            continue
        shapes = {name: shape for name in group if (shape := _shape(cameras[name], inspectors[name])) is not None}
        for shape in sorted(set(shapes.values())):
            names = [name for name in shapes if shapes[name] == shape]
            if len(names) < 2 or is_stopped():
                continue
            if tell is not None:
                tell("LOADING", f"measuring runs of several frames of {Path(first.file.name).name}")
            limit = _measured(first, shape, min(len(names), MAX_BATCH), is_stopped)
            limits |= {(name, shape): limit for name in names}
    return limits


def _groups(inspectors: Mapping[str, Inspector]) -> list[list[str]]:
    """The cameras, by the model that they share."""
    groups: list[list[str]] = []
    for name, inspector in inspectors.items():
        group = next((group for group in groups if inspectors[group[0]].shares_runs_with(inspector)), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return groups


def _compiles_per_shape(inspector: Inspector) -> bool:
    """Where a number of frames that is new means another compilation: minutes with TensorRT, in the middle of the start."""
    return inspector.runtime.fixed_frame or any(provider in COMPILING for provider in inspector.ran.actual)


def _shape(settings: CameraSettings, inspector: Inspector) -> Shape | None:
    """Of the frames that are to come: the ROI's, else the graph's, else the training's (another is refused with `framing: same`)."""
    spec = inspector.metadata.input
    size = spec.trained_size if (spec.h and spec.w) or settings.framing == "same" else None
    if settings.roi is not None:
        size = settings.roi[2:]
    return None if size is None else (size[1], size[0], 3)


def _measured(inspector: Inspector, shape: Shape, most: int, is_stopped: Callable[[], bool]) -> int:
    """The largest number of frames up to `most` that is faster in one run."""
    ratios = measure_ratios(inspector, shape, most, is_stopped)
    limit = max((n for n, ratio in ratios.items() if ratio < WORTH), default=1)
    log.info(
        "%s, frames of %dx%d from several cameras: %s (time of one run / of single runs: %s)",
        inspector.file.name,
        shape[1],
        shape[0],
        f"up to {limit} in one run" if limit > 1 else "one by one, since that is as fast" if ratios else "one by one",
        ", ".join(f"{n} frames {ratio:.2f}" for n, ratio in ratios.items()) or f"not measured within {MEASURE_S:g} s",
    )
    return limit


def measure_ratios(
    inspector: Inspector, shape: Shape, most: int, is_stopped: Callable[[], bool] = lambda: False
) -> dict[int, float]:
    """Time of one run of n frames / time of n single runs, for n from 2 to `most`; the two take turns.

    What cannot be measured a few times within MEASURE_S, one run more at most, is left out; empty where the model fails.
    """
    images = np.random.default_rng(0).integers(0, 256, (most, *shape), dtype=np.uint8)
    deadline_s = time.monotonic() + MEASURE_S
    ratios: dict[int, float] = {}

    def is_over() -> bool:
        return is_stopped() or time.monotonic() > deadline_s

    def together(n: int) -> None:
        inspector.run(np.stack(list(images[:n])), inspector.fetched)

    def single(n: int) -> None:
        for image in images[:n]:
            if not is_over():
                inspector.run(image[None], inspector.fetched)

    try:
        for n in range(2, most + 1):
            steps = {"together": lambda n=n: together(n), "single": lambda n=n: single(n)}
            taken = paired_ms(steps, ROUNDS, is_over=is_over)
            if len(taken["single"]) >= MIN_ROUNDS:
                ratios[n] = _median(taken["together"]) / _median(taken["single"])
    except InspectionError as error:
        log.warning("%s takes one frame at a time: %s", inspector.file.name, error)
        return {}
    return ratios


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
