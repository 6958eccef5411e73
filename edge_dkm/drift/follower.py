"""Watches the cameras of a running line for drift, part by part, on the thread of edge_dkm/afterwards.py."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edge_dkm.drift.monitor import DriftMonitor, DriftState
from edge_dkm.drift.quality import measure
from edge_dkm.drift.reference import Reference, read_reference
from edge_dkm.drift.statistic import Sighting
from edge_dkm.inspector import Inspector
from edge_dkm.pipeline import Outcome
from edge_dkm.settings import DriftSettings

SAY_EVERY_S = 60.0  # where nothing has changed
LOOK_EVERY_PARTS = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DriftReport:
    """The state of a camera, and with which codebook. `missing`: what is not watched, and why."""

    state: DriftState
    codebook: str
    missing: str


@dataclass
class _Camera:
    monitor: DriftMonitor
    codebook: str
    parts: int = 0  # looked at
    news: tuple[object, ...] | None = None
    say_due_s: float = 0.0


class DriftFollower:
    """`reports` holds the newest report of each camera that has seen parts; `changed` is called with its name when it is to be said."""

    def __init__(
        self, settings: DriftSettings, inspectors: Mapping[str, Inspector], changed: Callable[[str], None]
    ) -> None:
        self._settings, self._changed = settings, changed
        self._inspectors = inspectors
        self._references = {name: read_reference(inspector.metadata) for name, inspector in inspectors.items()}
        self._cameras: dict[str, _Camera] = {}
        self._due_s = dict.fromkeys(inspectors, -math.inf)
        self.reports: dict[str, DriftReport] = {}
        for name, reference in self._references.items():
            if settings.enabled and reference.missing:
                log.warning("drift of camera %s: %s", name, reference.missing)

    def wants_image(self, outcome: Outcome) -> bool:
        """For light, focus and position, where the model's reference has those: of `max_parts_per_s` at most, evenly in time."""
        case = outcome.case
        has_pictures = self._references[case.camera].frame is not None
        if not (self._settings.enabled and has_pictures) or outcome.inspection is None:
            return False
        due_s, period_s = self._due_s[case.camera], 1 / self._settings.max_parts_per_s
        if case.captured_s < due_s:
            return False
        # Keeps to its grid while frames come.
        self._due_s[case.camera] = max(due_s, case.captured_s - period_s) + period_s
        return True

    def follow(self, outcome: Outcome) -> None:
        """Takes a part that has an answer, and a picture where the reference has those; another codebook begins anew."""
        inspection, name = outcome.inspection, outcome.case.camera
        is_passed_over = outcome.image is None and self._references[name].frame is not None
        if not self._settings.enabled or inspection is None or is_passed_over:
            return
        camera = self._cameras.get(name)
        if camera is None or camera.codebook != inspection.codebook:
            camera = self._cameras[name] = self._begin(name, inspection.codebook)
        quality = None if outcome.image is None else measure(outcome.image)
        sighting = Sighting(inspection.embedding, inspection.cluster.id, inspection.novelty_score, quality)
        camera.monitor.observe(sighting, inspection.is_novel)
        camera.parts += 1
        if camera.parts % LOOK_EVERY_PARTS == 1:
            self._look(name, camera)

    def close(self) -> None:
        """Says how things stand at the end."""
        for name, camera in self._cameras.items():
            self._look(name, camera, is_last=True)

    def _begin(self, name: str, codebook: str) -> _Camera:
        reference = self._reference(name, codebook)
        n_clusters = self._inspectors[name].metadata.n_clusters
        monitor = DriftMonitor(reference, n_clusters, self._settings.false_alarm_every, self._settings.run_in)
        return _Camera(monitor, codebook)

    def _reference(self, name: str, codebook: str) -> Reference:
        reference = self._references[name]
        return reference if codebook == "base" else reference.for_own_codebook()

    def _look(self, name: str, camera: _Camera, is_last: bool = False) -> None:
        state, now_s = camera.monitor.state(), time.monotonic()
        self.reports[name] = DriftReport(state, camera.codebook, camera.monitor.reference.missing)
        if state.news == camera.news and now_s < camera.say_due_s and not is_last:
            return
        if camera.news is not None and state.news != camera.news:
            log.info("drift of camera %s: moved %s, recommended %s", name, state.moved, state.recommended)
        camera.news, camera.say_due_s = state.news, now_s + SAY_EVERY_S
        self._changed(name)
