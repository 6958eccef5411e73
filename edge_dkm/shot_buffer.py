"""Shots waiting for inspection, and what became of every frame that a trigger chose."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from devices.triggers import Shot
from edge_dkm.message import CameraCounters
from edge_dkm.results import Case

MAX_WAITING = 16  # shots per camera that may wait for inspection

Policy = Literal["latest", "every"]


@dataclass
class Tally:
    """Counts of one camera. frames = results + bad + dropped + those under way."""

    frames: int = 0
    results: int = 0
    bad: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)

    def counters(self) -> CameraCounters:
        """As health messages carry them."""
        return CameraCounters(frames=self.frames, results=self.results, bad=self.bad, dropped=dict(self.dropped))


class ShotBuffer:
    """Shots waiting for inspection. A part always finds room or waits for it; a counted frame replaces its elder with policy `latest`."""

    def __init__(self, cameras: Mapping[str, Policy], tallies: Mapping[str, Tally]) -> None:
        self._policies, self._tallies = cameras, tallies
        self._waiting: dict[str, deque[tuple[Case, Shot]]] = {name: deque() for name in cameras}
        self._turn: deque[str] = deque(cameras)
        self._changed = threading.Condition()
        self._closed = False

    def put(self, case: Case, shot: Shot, is_part: bool) -> bool:
        """Adds a shot; blocks while there is no room for one that may not be dropped. False once the buffer is closed."""
        with self._changed:
            waiting = self._waiting[case.camera]
            if not is_part and self._policies[case.camera] == "latest":
                while waiting:
                    waiting.popleft()
                    self._tallies[case.camera].dropped["superseded"] += 1
            self._changed.wait_for(lambda: len(waiting) < MAX_WAITING or self._closed)
            if self._closed:
                return False
            waiting.append((case, shot))
            self._changed.notify_all()
            return True

    def get(self) -> tuple[Case, Shot] | None:
        """The next shot, the cameras taking turns; None once the buffer is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or any(self._waiting.values()))
            for _ in range(len(self._turn)):
                self._turn.rotate(-1)
                waiting = self._waiting[self._turn[-1]]
                if waiting:
                    found = waiting.popleft()
                    self._changed.notify_all()
                    return found
            return None

    def get_also(self, fits: Callable[[tuple[Case, Shot]], bool], limit: int) -> list[tuple[Case, Shot]]:
        """Up to `limit` shots that wait now: the eldest of each camera whose eldest fits, in turn. Waits for nothing."""
        found: list[tuple[Case, Shot]] = []
        with self._changed:
            for camera in list(self._turn):
                waiting = self._waiting[camera]
                if len(found) < limit and waiting and fits(waiting[0]):
                    found.append(waiting.popleft())
                    self._turn.remove(camera)
                    self._turn.append(camera)
            self._changed.notify_all()
        return found

    def close(self) -> None:
        """No more shots are taken; those waiting are still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def abandon(self) -> int:
        """Forgets what waits, counted as dropped; how many."""
        with self._changed:
            left = 0
            for name, waiting in self._waiting.items():
                if waiting:
                    self._tallies[name].dropped["stopped"] += len(waiting)
                left += len(waiting)
                waiting.clear()
            self._changed.notify_all()
            return left

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._waiting.values())
