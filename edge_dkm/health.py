"""Progress heartbeats of the line's stages. A stage is judged by what it has done, on the monotonic clock, not by being alive."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from edge_dkm.message import StageHealth

STUCK_S = 8.0  # so that the supervisor's next look is still within ten seconds

StageState = Literal["ok", "idle", "degraded", "stuck"]


class Stage:
    """One stage. `waiting` tells whether work lies before it; `excuse` names an outside cause (broker down, camera offline) or None.

    `stuck_s`: how long work may wait; more where a single piece may take longer.
    """

    def __init__(self, waiting: Callable[[], bool], excuse: Callable[[], str | None] = lambda: None) -> None:
        self._waiting, self._excuse = waiting, excuse
        self.stuck_s = STUCK_S
        self._lock = threading.Lock()
        self._count, self._last_s = 0, time.monotonic()
        self._idle_seen_s = self._last_s

    def progress(self, n: int = 1) -> None:
        """Something was done."""
        with self._lock:
            self._count += n
            self._last_s = time.monotonic()

    @property
    def is_waiting(self) -> bool:
        """Whether work lies before it."""
        return self._waiting()

    @property
    def count(self) -> int:
        """How much was done since the start."""
        return self._count

    def health(self) -> StageHealth:
        """`stuck`: work waits, nothing was done for `stuck_s`, and there is no excuse."""
        with self._lock:
            count, age_s = self._count, time.monotonic() - self._last_s
        waiting = self._waiting()
        if not waiting:
            self._idle_seen_s = time.monotonic()
        # Work that came a moment ago after an idle hour is not stuck.
        waits_s = min(age_s, time.monotonic() - self._idle_seen_s)
        state: StageState = "ok" if waiting or age_s < 1.0 else "idle"
        if self._excuse() is not None:
            state = "degraded"
            self._idle_seen_s = time.monotonic()  # when the cause is gone, its time begins anew
        elif waiting and waits_s > self.stuck_s:
            state = "stuck"
        return StageHealth(state=state, count=count, age_s=round(age_s, 3))


def rss_mb() -> int | None:
    """Resident memory of this process in megabytes; None where /proc is not there."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1_000_000
    except (OSError, IndexError, ValueError):
        return None
