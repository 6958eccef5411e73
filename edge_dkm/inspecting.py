"""From a shot to its answer, or to the declared reason why there is none; one shot at a time, or several that wait in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from devices.settings import CameraSettings
from devices.triggers import Shot
from edge_dkm.batching import Batching
from edge_dkm.errors import FrameError, InspectionError
from edge_dkm.inspector import Inspection, Inspector
from edge_dkm.results import Case, Clockings
from edge_dkm.shot_buffer import ShotBuffer

Found = tuple[Case, Shot]


@dataclass(frozen=True)
class Answer:
    """One shot's inspection, or its error. `image` is what was inspected, where there was a frame."""

    case: Case
    inspection: Inspection | None
    error: InspectionError | None
    clockings: Clockings
    image: NDArray[np.uint8] | None = None


class Inspecting:
    """Runs the models for one thread. `since_s`: when the run that is under way began, None where there is none.

    `alive` is called when a run has ended that brought no answer.
    """

    def __init__(
        self, cameras: Mapping[str, CameraSettings], inspectors: Mapping[str, Inspector], alive: Callable[[], None]
    ) -> None:
        self._cameras, self._inspectors, self._alive = cameras, inspectors, alive
        self.batching = Batching(inspectors)
        self.since_s: float | None = None

    def next_answers(self, buffer: ShotBuffer) -> Iterator[Answer] | None:
        """Those of the next shot, and of others that wait and may share its run; None once the buffer is closed and empty."""
        found = buffer.get()
        if found is None:
            return None
        return self._together([found, *self._companions(found, buffer)])

    def interrupt_slow(self, timeout_s: float) -> None:
        """Stops a run that has taken longer than that; the part ends in a declared failure."""
        since_s = self.since_s
        if since_s is not None and time.monotonic() - since_s > timeout_s:
            for inspector in self._inspectors.values():
                inspector.interrupt()

    def _companions(self, found: Found, buffer: ShotBuffer) -> list[Found]:
        """At most one of each other camera; nothing is waited for."""
        case, shot = found
        shape = shot.frame.image.shape
        limit = self.batching.limit(case.camera, shape)
        now_s = time.monotonic()
        if limit < 2 or not self._may_share(found, now_s):
            return []

        def fits(other: Found) -> bool:
            if not self.batching.shares(case.camera, other[0].camera) or other[0].camera == case.camera:
                return False
            return other[1].frame.image.shape == shape and self._may_share(other, now_s)

        return buffer.get_also(fits, limit - 1)

    def _may_share(self, found: Found, now_s: float) -> bool:
        """What has no answer anyway, and what may be no picture, goes alone."""
        case, shot = found
        is_late = _lateness(case, self._cameras[case.camera].deadline_ms, now_s) is not None
        return shot.frame.fault is None and shot.frame.image.dtype == np.uint8 and not is_late

    def _together(self, found: Sequence[Found]) -> Iterator[Answer]:
        answers: Sequence[Inspection | InspectionError] = ()
        started_s = time.monotonic()
        if len(found) > 1:
            first, twins = found[0][0].camera, [self._inspectors[case.camera] for case, _ in found]
            self.since_s = started_s
            try:
                answers = twins[0].inspect_for(twins, [shot.frame.image for _, shot in found])
            except InspectionError as caught:  # of one, or of the run: each for itself, so that none fails for another
                self.batching.stop(first, caught)
                self._alive()  # a run that was stopped for its time has had it; the next one has its own
            finally:
                self.since_s = None
        if not answers:
            yield from (self._alone(case, shot) for case, shot in found)
            return
        clockings = Clockings(started_s, time.monotonic())
        for (case, shot), answer in zip(found, answers, strict=True):
            late = _lateness(case, self._cameras[case.camera].deadline_ms, clockings.ended_s)
            inspection = answer if isinstance(answer, Inspection) and late is None else None
            error = None if inspection else late if isinstance(answer, Inspection) else answer
            yield Answer(case, inspection, error, clockings, shot.frame.image)

    def _alone(self, case: Case, shot: Shot) -> Answer:
        self.since_s = started_s = time.monotonic()
        deadline_ms = self._cameras[case.camera].deadline_ms
        inspection: Inspection | None = None
        error = _lateness(case, deadline_ms, started_s)
        try:
            if error is None and shot.frame.fault is not None:
                raise FrameError(shot.frame.fault.code, shot.frame.fault.detail)
            if error is None:
                inspection = self._inspectors[case.camera].inspect(shot.frame.image)
                error = _lateness(case, deadline_ms, time.monotonic())
        except InspectionError as caught:
            # Its traceback would hold this function, and by that the picture, until the garbage collector comes.
            error = caught.with_traceback(None)
        finally:
            self.since_s = None
        image = None if shot.frame.fault else shot.frame.image
        return Answer(case, None if error else inspection, error, Clockings(started_s, time.monotonic()), image)


def _lateness(case: Case, deadline_ms: int | None, now_s: float) -> InspectionError | None:
    """The declared failure of a part whose deadline is over."""
    late_ms = (now_s - case.fired_s) * 1000
    if deadline_ms is None or late_ms <= deadline_ms:
        return None
    text = f"no answer within deadline_ms {deadline_ms} ({late_ms:.0f} ms after the trigger)"
    return InspectionError("R-DEADLINE", text)
