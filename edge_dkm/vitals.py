"""What a line knows of its own health, looked at once a second by the supervisor: for health messages, the watchdog, HTTP, metrics, admin.

Who asks from another thread gets the last look: a database or camera that hangs must not hang the one who asks about it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from devices.capture import Capture
from edge_dkm import __version__
from edge_dkm.clock import is_synced, wall_s
from edge_dkm.health import STUCK_S, StageState, rss_mb
from edge_dkm.message import OutboxHealth, StageHealth
from edge_dkm.results import model_info
from edge_dkm.service.metrics import CameraSnapshot, ClockJumps, ModelRow, Snapshot

if TYPE_CHECKING:
    from edge_dkm.line import Line

LOOK_EVERY_S = 1.0
STALL_MARGIN_S = 3.0
RECORDED_S = 60.0  # recorded material may be slow to read; it has no watchdog of its own
STALE_S = 10.0  # a supervisor that has not looked for so long hangs


class Vitals:
    """See the module."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._started_s = time.monotonic()
        self._looked_s = self._started_s
        self._jumps = ClockJumps()
        self._loops = (0, self._started_s)
        self.stages: dict[str, StageHealth] = {}
        self.outbox = OutboxHealth(rows=0, bytes=0, oldest_s=0.0)
        self.outbox_dropped: Mapping[str, Mapping[str, int]] = {}
        self.free_mb = line.folder.free_mb()

    @property
    def uptime_s(self) -> float:
        """Since the line started."""
        return time.monotonic() - self._started_s

    @property
    def is_fresh(self) -> bool:
        """Whether the supervisor still looks, and nothing is stuck: what a heartbeat to a machine stands for."""
        return not self._stuck()

    def look(self) -> dict[str, StageHealth]:
        """Looks at everything, now."""
        line = self._line
        stages = {name: stage.health() for name, stage in line.pipeline.stages.items()}
        is_busy = any(stage.is_waiting for stage in line.pipeline.stages.values())
        stages |= {f"cam:{name}": camera_stage(capture, is_busy) for name, capture in line.captures.items()}
        stages["mqtt"] = self._mqtt()
        stages["commands"] = line.commands.stage.health()
        stages |= {f"output:{name}": output.stage.health() for name, output in line.rejects.items()}
        status = line.outbox.status()
        self.outbox = OutboxHealth(rows=status.rows, bytes=status.bytes, oldest_s=round(status.oldest_s, 1))
        self.outbox_dropped = status.dropped
        self.free_mb = line.folder.free_mb()
        self._jumps.look(wall_s(), time.monotonic())
        self.stages, self._looked_s = stages, time.monotonic()
        return stages

    def healthz(self) -> tuple[bool, dict[str, Any]]:
        """Whether the process serves: no stage is stuck."""
        stuck = self._stuck()
        return not stuck, {"stuck": stuck, "uptime_s": round(self.uptime_s, 1)}

    def readyz(self) -> tuple[bool, dict[str, Any]]:
        """Whether parts can be inspected: models proven, a camera gives frames, the outbox takes results."""
        line = self._line
        online = [name for name, capture in line.captures.items() if capture.status().state == "online"]
        why = []
        if not online:
            why.append("no camera gives frames")
        if line.outbox.is_blocked:
            why.append("the outbox is full")
        if line.pipeline.failed is not None:
            why.append(str(line.pipeline.failed))
        if line.pipeline.is_paused:
            why.append("paused")
        return not why and self.is_fresh, {"why": why, "cameras": online, "alarms": self.alarm_codes()}

    def alarm_codes(self) -> list[str]:
        """What is raised now."""
        return [alarm.code for alarm in self._line.alarms.active()]

    def restarts(self) -> dict[str, int]:
        """By stage: cameras count their children themselves."""
        counts = self._line.restarts.counts()
        for name, capture in self._line.captures.items():
            if capture.status().restarts:
                counts[f"cam:{name}"] = counts.get(f"cam:{name}", 0) + capture.status().restarts
        return counts

    def snapshot(self) -> Snapshot:
        """For metrics."""
        line = self._line
        observer, publisher = line.observer, line.publisher.status()
        cameras = {
            name: CameraSnapshot(
                capture.status().state == "online",
                line.pipeline.tallies[name].counters(),
                dict(observer.states[name]),
                observer.infer_s[name].counts(),
                observer.novelty[name].counts(),
            )
            for name, capture in line.captures.items()
        }
        models = tuple(
            ModelRow(name, info.id, info.sha256, info.codebook)
            for name, info in ((name, model_info(inspector)) for name, inspector in line.inspectors.items())
        )
        rss = rss_mb()
        return Snapshot(
            version=__version__,
            uptime_s=self.uptime_s,
            cameras=cameras,
            stages=self.stages,
            restarts=self.restarts(),
            models=models,
            outbox=self.outbox,
            outbox_dropped=self.outbox_dropped,
            is_blocked=line.outbox.is_blocked,
            pubacks=dict(line.publisher.codes),
            ack_lag=publisher.unacknowledged_by_consumer,
            is_connected=publisher.connected,
            disk_free_bytes=self.free_mb * 1_000_000,
            rss_bytes=None if rss is None else rss * 1_000_000,
            state_corrupt=sum(place is not None for place in (line.outbox.quarantined, line.restarts.quarantined)),
            clock_jumps=self._jumps.count,
            clock_synced=is_synced(),
            drift={name: report.state for name, report in list(line.drift.reports.items())},
            not_followed=line.afterwards.left_out,
        )

    def _stuck(self) -> list[str]:
        stuck = [name for name, stage in self.stages.items() if stage.state == "stuck"]
        is_stale = time.monotonic() - self._looked_s >= STALE_S
        return [*stuck, "supervisor"] if is_stale else stuck

    def _mqtt(self) -> StageHealth:
        """A connected publisher turns its loop once a second at least; without a connection its problem says why."""
        publisher, now_s = self._line.publisher, time.monotonic()
        status, loops = publisher.status(), publisher.loops  # in this order
        if loops != self._loops[0] or not status.connected:  # without a connection it does not turn
            self._loops = (loops, now_s)
        age_s = now_s - self._loops[1]
        state: StageState = "ok" if self.outbox.rows else "idle"
        if not publisher.is_alive() or (status.connected and age_s > STUCK_S):
            state = "stuck"
        elif status.problem is not None:
            state = "degraded"
        return StageHealth(state=state, count=status.acknowledged, age_s=round(age_s, 3))


def camera_stage(capture: Capture, is_busy: bool) -> StageHealth:
    """A camera that is offline is known to be; one that is online and gives nothing is stuck, unless a busy pipeline holds it back.

    The capture itself replaces a live camera's process after `stall_s`; what is stuck in spite of it needs a new process of ours.
    """
    status = capture.status()
    # Taking shots is progress, too: where each waits for a slow disk, news of frames lies behind them.
    age_s = min((status.frame_age_ms or 0) / 1000, capture.handed_over_age_s)
    state: StageState = "ok"
    if capture.ended.is_set():
        state = "idle"
    elif status.state == "offline":
        state = "degraded"
    elif age_s > _patience_s(capture) and not (capture.is_handing_over and is_busy):
        state = "stuck"
    return StageHealth(state=state, count=status.frames, age_s=age_s)


def _patience_s(capture: Capture) -> float:
    if capture.is_live or capture.is_handing_over:
        return max(STUCK_S, capture.settings.stall_s + STALL_MARGIN_S)
    return RECORDED_S + (3 / capture.settings.fps if capture.settings.fps else 0.0)
