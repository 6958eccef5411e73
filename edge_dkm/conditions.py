"""What is not as it should be, looked at regularly: it becomes alarms, and the gravest one the reason of the line's state."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from edge_dkm.clock import rfc3339, utc_now

if TYPE_CHECKING:
    from edge_dkm.line import Line

MIN_FREE_MB = 50
MIN_YEAR = 2025  # an earlier time is that of a clock without a battery
DROPS_SHOW_S = 60.0  # how long an alarm about drops stays after the last one


@dataclass(frozen=True)
class Condition:
    """`alarm`: the code of the alarm (with `camera`), `code`: the exact cause. `degrades`: whether the line's state says so too."""

    alarm: str
    code: str
    detail: str
    camera: str | None = None
    degrades: bool = True


class Conditions:
    """Looks at disk, outbox, delivery, cameras, outputs and drift of a line."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._raised: set[tuple[str, str | None]] = set()
        self._dropped = 0
        self._dropped_at_s: float | None = None

    def look(self) -> list[Condition]:
        """What holds now, the gravest first; alarms are raised and cleared."""
        found = [
            *self._storage(),
            *clock_condition(utc_now()),
            *self._delivery(),
            *self._cameras(),
            *self._outputs(),
            *self._drifts(),
        ]
        now = {(condition.alarm, condition.camera) for condition in found}
        for code, camera in self._raised - now:
            self._line.alarms.clear(code, camera)
        for condition in found:
            self._line.alarms.raise_(condition.alarm, f"{condition.code} {condition.detail}", condition.camera)
        self._raised = now
        self._line.alarms.flush()
        return found

    def _storage(self) -> Iterator[Condition]:
        outbox, folder = self._line.outbox, self._line.folder
        free_mb = folder.free_mb()
        if outbox.is_blocked:
            yield Condition("S-BLOCKED", "S-BLOCKED", "the outbox is full and delivery.limit is block: the line waits")
        if free_mb < MIN_FREE_MB:
            yield Condition("S-FULL", "S-FULL", f"{free_mb} MB free in {folder.path}")
        if outbox.quarantined is not None:
            text = f"the outbox was damaged and lies in {outbox.quarantined}; a new epoch has begun"
            yield Condition("S-CORRUPT", "S-CORRUPT", text, degrades=False)
        drops = self._drops()
        if drops is not None:
            yield Condition("S-DROPPED", "S-DROPPED", drops)

    def _drops(self) -> str | None:
        """Results that a limit has dropped lately."""
        dropped = self._line.vitals.outbox_dropped
        count = sum(sum(reasons.values()) for reasons in dropped.values())
        if count > self._dropped:
            self._dropped, self._dropped_at_s = count, time.monotonic()
        if self._dropped_at_s is None or time.monotonic() - self._dropped_at_s > DROPS_SHOW_S:
            return None
        words = ", ".join(f"{camera} {n} by {why}" for camera, reasons in dropped.items() for why, n in reasons.items())
        return f"results were dropped and declared as gaps since the start: {words}"

    def _delivery(self) -> Iterator[Condition]:
        problem = self._line.publisher.status().problem
        if problem is not None:
            yield Condition(problem.code, problem.code, problem.text)

    def _cameras(self) -> Iterator[Condition]:
        for name, capture in self._line.captures.items():
            status = capture.status()
            if capture.ended.is_set() or status.code is None:
                continue
            if status.state == "offline":
                yield Condition("C-OFFLINE", status.code, status.detail or "", name)
            elif status.state == "bad":
                yield Condition("C-BAD", status.code, status.detail or "", name)

    def _outputs(self) -> Iterator[Condition]:
        for name, output in self._line.rejects.items():
            status = output.status()
            if status.code is not None:
                yield Condition("O-OUTPUT", status.code, status.problem or "", name)

    def _drifts(self) -> Iterator[Condition]:
        for name, report in list(self._line.drift.reports.items()):
            state = report.state
            if state.recommended != "none":
                moved = ", ".join(state.moved) or "the embeddings"
                text = f"moved: {moved}; {state.novelty_rate:.1%} of recent parts are novel; recommended: {state.recommended}"
                yield Condition("DRIFT", f"D-{state.recommended.upper()}", text, name, degrades=False)


def clock_condition(now: datetime) -> Iterator[Condition]:
    """A clock that was never set: results carry its time, and certificates seem not yet valid."""
    if now.year < MIN_YEAR:
        text = f"this device's clock says {rfc3339(now)}: results carry that time; set it, or let it synchronise"
        yield Condition("S-CLOCK", "S-CLOCK", text)
