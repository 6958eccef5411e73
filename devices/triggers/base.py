"""What every trigger offers to the capture thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import model_validator

from configs import Settings
from devices.frame import Frame, Roi


class TriggerSettings(Settings):
    """`kind` is the key in TRIGGERS."""

    kind: str


class PlannedTriggerSettings(TriggerSettings):
    """Kinds whose names are fixed and which are not built yet."""

    kind: Literal["plc"]

    @model_validator(mode="after")
    def _refuse(self) -> PlannedTriggerSettings:
        raise ValueError(f"trigger kind {self.kind} is not built yet, expected free, timer, part_present or mqtt")


@dataclass(frozen=True)
class Shot:
    """A frame to be inspected. `trigger_id` counts the trigger's shots from 1; `token` is that of the command that asked for it."""

    frame: Frame
    kind: str
    trigger_id: int
    token: str | None = None


class Trigger:
    """Looks at every frame in order and decides which one is inspected.

    `stands_for_part`: each shot is a part that must not be lost; else frames are counted, not promised. `present_id` is the id of the
    shot that will come of the part now in view, or None.
    """

    Settings: ClassVar[type[TriggerSettings]]
    stands_for_part: ClassVar[bool] = False

    def __init__(self, settings: TriggerSettings, roi: Roi | None) -> None:
        self.settings, self.roi = settings, roi
        self._count = 0

    @property
    def present_id(self) -> int | None:
        """See the class."""
        return None

    def update(self, frame: Frame) -> Shot | None:
        """The shot that this frame completes, if any. Frames come cropped to the ROI."""
        raise TypeError(f"{type(self).__name__} has no update")

    def reset(self) -> None:
        """The stream was interrupted: forget what was half seen."""

    def fire(self, token: str, fired_s: float) -> None:
        """Asks for the next frame captured after `fired_s` (monotonic); only some kinds take commands, the others raise ValueError."""
        raise ValueError(f"trigger kind is {self.settings.kind}, which takes no commands; expected mqtt")

    def withdraw(self, token: str) -> None:
        """Forgets a token that nobody waits for any more."""

    def count_from(self, next_id: int) -> None:
        """The next shot gets this id: the numbers of a camera go on when its process is replaced."""
        self._count = next_id - 1

    def _shot(self, frame: Frame, token: str | None = None) -> Shot:
        self._count += 1
        return Shot(frame, self.settings.kind, self._count, token)
