"""When a frame is inspected: kinds of triggers, one per file. Adding one: a file, and a line here."""

from __future__ import annotations

from devices.triggers.base import Shot, Trigger, TriggerSettings
from devices.triggers.free import FreeTrigger
from devices.triggers.mqtt import MqttTrigger
from devices.triggers.part_present import PartPresentTrigger
from devices.triggers.timer import TimerTrigger

TRIGGERS: dict[str, type[Trigger]] = {
    "free": FreeTrigger,
    "timer": TimerTrigger,
    "part_present": PartPresentTrigger,
    "mqtt": MqttTrigger,
}

__all__ = ["TRIGGERS", "Shot", "Trigger", "TriggerSettings"]
