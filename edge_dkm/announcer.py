"""Builds and announces what a running line says about itself: info, state, health, cameras. Called by the supervisor."""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING, Any, Literal

import onnxruntime as ort

from devices.capture import CameraStatus
from devices.sources import source_kind
from edge_dkm import __version__
from edge_dkm.clock import is_synced, rfc3339, utc_now
from edge_dkm.health import STUCK_S, Stage, rss_mb
from edge_dkm.message import MESSAGES, CameraHealth, Health, Info, StageHealth, State
from edge_dkm.results import model_info

if TYPE_CHECKING:
    from edge_dkm.supervisor import Line

MIN_FREE_MB = 50


class Announcer:
    """Everything retained is said again on each connection; messages get their timestamp when they are sent."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._base = line.settings.base_topic
        self._station = line.settings.station
        self._started_s = time.monotonic()
        self._state: tuple[str, str | None] = ("", None)
        self._mqtt = Stage(lambda: line.outbox.status().rows > 0, lambda: line.publisher.status().problem)
        self._acknowledged = 0

    def everything(self) -> None:
        """Info and the state of every camera."""
        self.info()
        for name in self._line.captures:
            self.camera(name)

    def state_now(self) -> None:
        """The state as the cameras and the delivery make it."""
        line = self._line
        offline = [
            status
            for capture in line.captures.values()
            if not capture.ended.is_set() and (status := capture.status()).state != "online"
        ]
        failed = next((status for status in offline if status.code), None)
        problem = line.publisher.status().problem
        free_mb = line.folder.free_mb()
        if free_mb < MIN_FREE_MB:
            self._announce_state("degraded", "S-FULL", f"{free_mb} MB free in {line.folder.path}")
        elif problem is not None:
            self._announce_state("degraded", "M-DELIVERY", problem)
        elif failed is not None:
            self._announce_state("degraded", failed.code, failed.detail)
        elif offline:
            self._announce_state("ready")
        else:
            self._announce_state("running")

    def state(self, state: str, error: BaseException | None = None) -> None:
        """A state that the supervisor decides: warming_up, halted, error."""
        self._announce_state(state, "E-STOPPED" if error else None, str(error) if error else None)

    def _announce_state(self, state: str, code: str | None = None, detail: str | None = None) -> None:
        if (state, code) == self._state:
            return
        self._state = (state, code)
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
        clusters = [{"id": c.id, "name": c.name, "verdict": c.verdict, "n": c.n} for c in inspector.metadata.clusters]
        cameras: dict[str, Any] = {}
        for name, capture in line.captures.items():
            width, height = capture.frame_size or (None, None)
            cameras[name] = {
                "kind": source_kind(capture.settings.source)[0],
                "w": width,
                "h": height,
                "roi": capture.settings.roi,
            }
        delivery = {"mode": line.settings.delivery.mode, "order": line.settings.delivery.order}
        versions = {"edge_dkm": __version__, "onnxruntime": ort.__version__, "python": platform.python_version()}
        line.publisher.announce(
            f"{self._base}/info",
            lambda session: Info.model_validate(
                {
                    **self._common(session),
                    "model": model.model_dump(),
                    "clusters": clusters,
                    "providers": {"requested": list(inspector.runtime.providers), "actual": inspector.providers},
                    "precision": "fp32",
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

    def health(self) -> None:
        """Stages, counters, outbox, disk, memory, clock."""
        line = self._line
        acknowledged = line.publisher.status().acknowledged
        if acknowledged > self._acknowledged:
            self._mqtt.progress(acknowledged - self._acknowledged)
            self._acknowledged = acknowledged
        stages = {f"cam:{name}": _camera_stage(capture.status()) for name, capture in line.captures.items()}
        stages |= {name: stage.health() for name, stage in line.pipeline.stages.items()} | {"mqtt": self._mqtt.health()}
        outbox = line.outbox.status()
        fields = {
            "uptime_s": round(time.monotonic() - self._started_s, 1),
            "epoch": line.outbox.epoch,
            "last": line.outbox.last_cseq(),
            "stages": stages,
            "counters": {name: tally.counters() for name, tally in line.pipeline.tallies.items()},
            "outbox": {"rows": outbox.rows, "bytes": outbox.bytes, "oldest_s": round(outbox.oldest_s, 1)},
            "disk_free_mb": line.folder.free_mb(),
            "rss_mb": rss_mb(),
            "clock_synced": is_synced(),
        }
        line.publisher.tell(
            f"{self._base}/health", lambda session: Health.model_validate({**self._common(session), **fields})
        )

    def _common(self, session: int) -> dict[str, Any]:
        return {"ts": rfc3339(utc_now()), "station": self._station, "session": session}


def _camera_stage(status: CameraStatus) -> StageHealth:
    age_s = (status.frame_age_ms or 0) / 1000
    state: Literal["ok", "degraded", "stuck"] = (
        "degraded" if status.state != "online" else "stuck" if age_s > STUCK_S else "ok"
    )
    return StageHealth(state=state, count=status.frames, age_s=age_s)


def _camera_fields(status: CameraStatus) -> dict[str, Any]:
    return {
        "state": status.state,
        "code": status.code,
        "fps": status.fps,
        "frame_age_ms": status.frame_age_ms,
        "reconnects": status.reconnects,
    }
