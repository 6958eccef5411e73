"""One frame per period is inspected; `trigger: {kind: timer, period_ms: 500}`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from devices.frame import Frame, Roi
from devices.triggers.base import Shot, Trigger, TriggerSettings


class TimerSettings(TriggerSettings):
    """The period."""

    kind: Literal["timer"] = "timer"
    period_ms: int = Field(1000, ge=1)


class TimerTrigger(Trigger):
    """The first frame at or after each tick; a late frame moves no tick."""

    Settings = TimerSettings
    settings: TimerSettings

    def __init__(self, settings: TimerSettings, roi: Roi | None) -> None:
        super().__init__(settings, roi)
        self._due_s: float | None = None

    def update(self, frame: Frame) -> Shot | None:
        period_s = self.settings.period_ms / 1000
        if self._due_s is None:
            self._due_s = frame.mono_s
        if frame.mono_s < self._due_s:
            return None
        self._due_s += period_s * (1 + (frame.mono_s - self._due_s) // period_s)
        return self._shot(frame)
