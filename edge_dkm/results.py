"""Turns what happened to one shot into a `dkm.result/1` message; pure, so that the contract is tested without a camera."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from edge_dkm.clock import boot_id, rfc3339, utc_at
from edge_dkm.contract import CONTRACT
from edge_dkm.errors import FrameError, InspectionError
from edge_dkm.inspector import Inspection, Inspector
from edge_dkm.message import (
    MAX_RESULT_BYTES,
    ClusterInfo,
    ErrorInfo,
    ModelInfo,
    NoveltyInfo,
    Part,
    Result,
    Timing,
    TriggerInfo,
)
from edge_dkm.outbox import Draft, Intent, Numbers

_boot_id = functools.cache(boot_id)


@dataclass(frozen=True)
class Case:
    """A shot on its way: who, what started it, when the frame was captured and the trigger fired (monotonic seconds)."""

    result_id: str
    station: str
    camera: str
    trigger: TriggerInfo
    ts: str
    captured_s: float
    fired_s: float
    part: Part | None = None


@dataclass(frozen=True)
class Clockings:
    """Monotonic seconds at which inference began and ended."""

    started_s: float
    ended_s: float

    def timing(self, case: Case) -> Timing:
        """In milliseconds since the capture."""
        return Timing(
            capture=_ms(self.started_s - case.captured_s),
            infer=_ms(self.ended_s - self.started_s),
            total=_ms(self.ended_s - case.captured_s),
        )


def model_info(inspector: Inspector, inspection: Inspection | None = None) -> ModelInfo:
    """The model and codebook that judge now; of an inspection, those that judged it: the codebook may have been switched since."""
    now = inspector.codebook
    codebook = inspection.codebook if inspection is not None else now.sha12 if now is not None else "base"
    return ModelInfo(id=inspector.metadata.model_id, sha256=inspector.file.sha256, codebook=codebook, contract=CONTRACT)


def _heading(case: Case, numbers: Numbers) -> dict[str, Any]:
    """What every result says of itself."""
    return {
        "result_id": case.result_id,
        "epoch": numbers.epoch,
        "seq": numbers.seq,
        "cseq": numbers.cseq,
        "boot_id": _boot_id(),
        "ts": case.ts,
        "station": case.station,
        "camera": case.camera,
        "trigger": case.trigger,
        "part": case.part,
    }


def completed(case: Case, numbers: Numbers, model: ModelInfo, inspection: Inspection, clockings: Clockings) -> Result:
    """The result of an inspection."""
    cluster = inspection.cluster
    return Result(
        **_heading(case, numbers),
        state="completed",
        model=model,
        cluster=ClusterInfo(
            id=cluster.id,
            name=cluster.name,
            distance=_short(inspection.distance),
            margin=None if inspection.margin is None else _short(inspection.margin),
        ),
        novelty=NoveltyInfo(
            score=_short(inspection.novelty_score),
            threshold=inspection.novelty_threshold,
            p_value=_short(inspection.p_value),
            is_novel=inspection.is_novel,
        ),
        verdict=inspection.verdict,
        reason=inspection.reason,
        timing_ms=clockings.timing(case),
    )


def without_answer(case: Case, numbers: Numbers, error: InspectionError, model: ModelInfo | None = None) -> Result:
    """The declared result of a part that got no answer: `bad_frame` where the frame was at fault, else `failed`."""
    is_bad = isinstance(error, FrameError)
    return Result(
        **_heading(case, numbers),
        state="bad_frame" if is_bad else "failed",
        model=model,
        verdict="error",
        reason="bad_frame" if is_bad else "failed",
        error=ErrorInfo(code=error.code, detail=error.detail),
    )


def fitted(result: Result) -> bytes:
    """The payload, within 1 KiB: names that are too long cost the timing first, then the answer, declared."""
    payload = result.payload()
    if len(payload) > MAX_RESULT_BYTES:
        payload = result.model_copy(update={"timing_ms": None}).payload()
    if len(payload) > MAX_RESULT_BYTES:
        text = f"the result has {len(payload)} bytes, at most {MAX_RESULT_BYTES} are sent; shorten names or part ids"
        error = ErrorInfo(code="R-OVERSIZE", detail=text)
        gone = {"cluster": None, "novelty": None, "timing_ms": None, "part": None}
        changes = {**gone, "state": "failed", "verdict": "error", "reason": "failed", "error": error}
        payload = result.model_copy(update=changes).payload()
    return payload


def restart_draft(intent: Intent, station: str, topic: str) -> Draft:
    """The declared result of a trigger whose inspection a restart cut off."""
    error = InspectionError("R-RESTART", "the program ended between the trigger and the result")
    case = Case(
        intent.result_id,
        station,
        intent.camera,
        TriggerInfo.model_validate({"kind": intent.kind, "id": intent.trigger_id}),
        intent.ts,
        0.0,
        0.0,
        None if intent.part_id is None else Part(id=intent.part_id, product=intent.product),
    )
    return Draft(intent.camera, topic, intent.result_id, lambda numbers: without_answer(case, numbers, error).payload())


def timestamp(mono_s: float) -> str:
    """The wall time of a monotonic moment, as messages carry it."""
    return rfc3339(utc_at(mono_s))


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 2)


def _short(value: float) -> float:
    """Six significant digits: what float32 holds, without its noise."""
    return float(f"{value:.6g}")
