"""What every kind of camera offers: one iterator of frames, and a way to end it from another thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from devices.frame import Frame
from devices.settings import CameraSettings


class Source(Protocol):
    """Opened by its constructor, which raises CameraError. `live` sources are reopened when they end, recorded ones are finished then."""

    kind: str
    live: bool

    def __init__(self, address: str, settings: CameraSettings) -> None: ...

    def __iter__(self) -> Iterator[Frame]: ...

    def close(self) -> None:
        """Ends the iteration soon; callable from any thread, more than once."""
