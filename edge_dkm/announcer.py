"""Builds and announces what a running line says about itself: info, state, health, cameras. Called by the supervisor."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from devices.capture import CameraStatus
from devices.sources import source_kind
from edge_dkm import __version__
from edge_dkm.clock import is_synced, rfc3339, utc_now
from edge_dkm.health import rss_mb
from edge_dkm.inspector import Inspector
from edge_dkm.message import MESSAGES, CameraHealth, Drift, Health, Info, State
from edge_dkm.results import model_info
from edge_dkm.service.state_log import log_change
from edge_dkm.service.watchdog import StuckError

if TYPE_CHECKING:
    from edge_dkm.conditions import Condition
    from edge_dkm.line import Line

log = logging.getLogger(__name__)


class Announcer:
    """Everything retained is said again on each connection; messages get their timestamp when they are sent."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._base = line.settings.base_topic
        self._station = line.settings.station
        self._state: tuple[str, str | None] = ("", None)
        self._words: dict[str, str | None] = {"state": "warming_up", "code": None, "detail": None}

    def everything(self) -> None:
        """Info and the state of every camera."""
        self.info()
        for name in self._line.captures:
            self.camera(name)

    def state_now(self, conditions: Sequence[Condition]) -> None:
        """The state as cameras, delivery and disk make it; the gravest condition is its reason."""
        line = self._line
        grave = next((condition for condition in conditions if condition.degrades), None)
        waiting = any(
            not capture.ended.is_set() and capture.status().state == "offline" for capture in line.captures.values()
        )
        if line.pipeline.is_paused:
            reason = line.live.current.pause_reason
            self._announce_state("halted", "PAUSED", reason or "paused by a command")
        elif grave is not None:
            self._announce_state("degraded", grave.code, grave.detail)
        else:
            self._announce_state("ready" if waiting else "running")

    def state_words(self) -> dict[str, str | None]:
        """State, code and detail as announced last."""
        return self._words

    def state_line(self) -> str:
        """The same in one line, with the counts."""
        committed, rows = self._line.pipeline.committed, self._line.vitals.outbox.rows
        reason = f" ({self._words['code']})" if self._words["code"] else ""
        return f"{self._words['state']}{reason}, {committed} results since the start, {rows} wait for delivery"

    def state(self, state: str, error: BaseException | None = None) -> None:
        """A state that the supervisor decides: warming_up, halted, error."""
        code = None if error is None else "W-STUCK" if isinstance(error, StuckError) else "E-STOPPED"
        self._announce_state(state, code, str(error) if error else None)

    def _announce_state(self, state: str, code: str | None = None, detail: str | None = None) -> None:
        if (state, code) == self._state:
            return
        self._state = (state, code)
        self._words = {"state": state, "code": code, "detail": detail}
        log_change(log, code or "STATE", level=logging.WARNING if code else logging.INFO, state=state, detail=detail)
        since = rfc3339(utc_now())
        reason = {"code": code, "detail": detail or ""} if code else None
        self._line.publisher.announce(
            f"{self._base}/state",
            lambda session: State.model_validate(
                {**self._common(session), "state": state, "since": since, "reason": reason}
            ),
        )

    def info(self) -> None:
        """Models, clusters, providers, cameras, versions."""
        line = self._line
        inspector = next(iter(line.inspectors.values()))
        model = model_info(inspector)
        clusters = [{"id": c.id, "name": c.name, "verdict": c.verdict, "n": c.n} for c in inspector.clusters]
        cameras: dict[str, Any] = {}
        for name, capture in line.captures.items():
            width, height = capture.frame_size or (None, None)
            cameras[name] = {
                "kind": source_kind(capture.settings.source)[0],
                "w": width,
                "h": height,
                "roi": capture.settings.roi,
            }
        providers, precision, device = _providers(inspector), inspector.precision, _device(inspector)
        delivery = {"mode": line.settings.delivery.mode, "order": line.settings.delivery.order}
        codebooks = line.codebooks.plain()
        versions = {"edge_dkm": __version__, "onnxruntime": ort.__version__, "python": platform.python_version()}
        line.publisher.announce(
            f"{self._base}/info",
            lambda session: Info.model_validate(
                {
                    **self._common(session),
                    "model": model.model_dump(),
                    "codebooks": codebooks,
                    "clusters": clusters,
                    "providers": providers,
                    "precision": precision,
                    "device": device,
                    "cameras": cameras,
                    "delivery": delivery,
                    "schemas": list(MESSAGES),
                    "versions": versions,
                }
            ),
        )

    def camera(self, name: str) -> None:
        """How one camera is."""
        capture = self._line.captures[name]
        self._line.publisher.announce(
            f"{self._base}/{name}/health",
            lambda session: CameraHealth.model_validate(
                {**self._common(session), "camera": name, **_camera_fields(capture.status())}
            ),
            qos=0,
        )

    def drift(self, name: str) -> None:
        """What one camera's drift is, as of its newest report. Called by the thread that follows parts."""
        report = self._line.drift.reports[name]
        fields = {"camera": name, "codebook": report.codebook, "missing": report.missing or None}
        self._line.publisher.announce(
            f"{self._base}/{name}/drift",
            lambda session: Drift.model_validate({**self._common(session), **fields, **report.state.plain()}),
            qos=0,
        )

    def health(self) -> None:
        """Stages, counters, outbox, disk, memory, clock."""
        line, vitals = self._line, self._line.vitals
        fields = {
            "uptime_s": round(vitals.uptime_s, 1),
            "epoch": line.outbox.epoch,
            "last": line.outbox.last_cseq(),
            "stages": vitals.stages,
            "counters": {name: tally.counters() for name, tally in line.pipeline.tallies.items()},
            "outbox": vitals.outbox,
            "restarts": vitals.restarts(),
            "alarms": vitals.alarm_codes(),
            "disk_free_mb": vitals.free_mb,
            "rss_mb": rss_mb(),
            "clock_synced": is_synced(),
        }
        line.publisher.tell(
            f"{self._base}/health", lambda session: Health.model_validate({**self._common(session), **fields})
        )

    def _common(self, session: int) -> dict[str, Any]:
        return {"ts": rfc3339(utc_now()), "station": self._station, "session": session}


def _providers(inspector: Inspector) -> dict[str, Any]:
    ran = inspector.ran
    return {"requested": list(inspector.runtime.providers), "actual": list(ran.actual), "kernels": ran.kernels}


def _device(inspector: Inspector) -> dict[str, Any]:
    runtime, ran = inspector.runtime, inspector.ran
    return {
        "title": runtime.device or runtime.providers[0],
        "run_here": bool(runtime.run_here),
        "head": ran.head,
        "compile_s": round(ran.compile_s, 3),
        "asked": ran.asked,
        "why": ran.why,
    }


def _camera_fields(status: CameraStatus) -> dict[str, Any]:
    return {
        "state": status.state,
        "code": status.code,
        "fps": status.fps,
        "frame_age_ms": status.frame_age_ms,
        "reconnects": status.reconnects,
    }
