"""What happens beside the record when a part passes: the reject output, the histograms, a picture for people. None of it may hold the line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_dkm.contract import Verdict
from edge_dkm.pipeline import Outcome
from edge_dkm.reject import RejectOutput
from edge_dkm.results import Case
from edge_dkm.service.histogram import INFER_S, NOVELTY, Histogram
from edge_dkm.settings import ImageSettings, LineSettings

Say = Callable[[str, Callable[[int], bytes], int], None]


class PartObserver:
    """The pipeline's observer. `say` publishes once (`Publisher.say`)."""

    def __init__(self, settings: LineSettings, rejects: Mapping[str, RejectOutput], say: Say) -> None:
        self._settings, self._rejects, self._say = settings, rejects, say
        self.infer_s = {name: Histogram(INFER_S) for name in settings.cameras}
        self.novelty = {name: Histogram(NOVELTY) for name in settings.cameras}
        self.states: dict[str, Counter[str]] = {name: Counter() for name in settings.cameras}

    def armed(self, case: Case) -> None:
        output = self._rejects.get(case.camera)
        if output is not None:
            deadline_ms = self._settings.cameras[case.camera].deadline_ms
            output.arm(case.result_id, case.fired_s + deadline_ms / 1000 if deadline_ms else None)

    def committed(self, outcome: Outcome) -> None:
        """The output first: a machine waits for it."""
        camera = outcome.case.camera
        if camera in self._rejects:
            self._rejects[camera].decide(outcome.case.result_id, cast(Verdict, outcome.verdict))
        self.states[camera][outcome.state] += 1
        if outcome.inspection is not None and outcome.timings is not None:
            self.infer_s[camera].observe(outcome.timings.infer / 1000)
            self.novelty[camera].observe(outcome.inspection.novelty_score)
        self._show(outcome)

    def _show(self, outcome: Outcome) -> None:
        when = self._settings.image.when
        if outcome.image is None or when == "never" or (when == "not_pass" and outcome.verdict == "pass"):
            return
        payload = jpeg(outcome.image, self._settings.image)
        self._say(f"{self._settings.base_topic}/{outcome.case.camera}/image", lambda _session: payload, 0)


def jpeg(image: NDArray[np.uint8], settings: ImageSettings) -> bytes:
    """The picture, made no larger than `max_px`."""
    scale = settings.max_px / max(image.shape[:2])
    if scale < 1:
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, settings.quality])
    return cast(Any, data).tobytes()  # type: ignore[no-any-return]
