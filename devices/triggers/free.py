"""Every frame is inspected; `trigger: {kind: free}`."""

from __future__ import annotations

from typing import Literal

from devices.frame import Frame
from devices.triggers.base import Shot, Trigger, TriggerSettings


class FreeSettings(TriggerSettings):
    """No options."""

    kind: Literal["free"] = "free"


class FreeTrigger(Trigger):
    """One shot per frame."""

    Settings = FreeSettings

    def update(self, frame: Frame) -> Shot | None:
        return self._shot(frame)
