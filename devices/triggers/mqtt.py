"""A command asks for the next frame; `trigger: {kind: mqtt}`. The runtime hands the command's token to `fire`."""

from __future__ import annotations

import threading
from collections import deque
from typing import Literal

from devices.frame import Frame, Roi
from devices.triggers.base import Shot, Trigger, TriggerSettings


class MqttSettings(TriggerSettings):
    """No options."""

    kind: Literal["mqtt"] = "mqtt"


class MqttTrigger(Trigger):
    """One shot per token, in the order of the tokens; each takes the first frame captured after it was fired, faulty or not."""

    Settings = MqttSettings
    stands_for_part = True

    def __init__(self, settings: MqttSettings, roi: Roi | None) -> None:
        super().__init__(settings, roi)
        self._waiting: deque[tuple[str, float]] = deque()
        self._lock = threading.Lock()  # commands come from another thread than frames

    def fire(self, token: str, fired_s: float) -> None:
        with self._lock:
            self._waiting.append((token, fired_s))

    def withdraw(self, token: str) -> None:
        with self._lock:
            self._waiting = deque(item for item in self._waiting if item[0] != token)

    def update(self, frame: Frame) -> Shot | None:
        with self._lock:
            if not self._waiting or frame.mono_s < self._waiting[0][1]:
                return None
            token, _ = self._waiting.popleft()
        return self._shot(frame, token)
