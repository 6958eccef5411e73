"""The judgement over the stages: go on, restart a stage that is stuck, or end the process so that systemd starts it anew.

The supervisor calls `judge` in the loop that also answers systemd, so a supervisor that hangs is found too: by systemd's own watchdog.

    stuck, with a hook     -> the hook restarts the stage (a camera: its child process is replaced)
    stuck, without a hook  -> StuckError: the process ends non-zero
    stuck once more after 3 restarts within 5 minutes -> StuckError
    any stage stuck        -> no WATCHDOG=1, so if the end does not come, systemd brings it
"""

from __future__ import annotations

import faulthandler
import logging
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edge_dkm.errors import EdgeError
from edge_dkm.message import StageHealth
from edge_dkm.service.restarts import PROCESS, RestartCounts

MAX_RESTARTS, WITHIN_S = 3, 300.0
SETTLE_S = 5.0  # for a restarted stage to leave `stuck`; three of them end well before WatchdogSec=30

log = logging.getLogger(__name__)


class StuckError(EdgeError):
    """A stage does nothing while work waits, and restarting it alone does not help: the process has to end. `stage`, `age_s`, `waiting`."""

    def __init__(self, stage: str, age_s: float, waiting: str, why: str) -> None:
        super().__init__(
            f"W-STUCK stage {stage} has done nothing for {age_s:.1f} s while {waiting}; {why}, so this process ends and has to be started again "
            "(the service does that by itself)"
        )
        self.stage, self.age_s, self.waiting = stage, age_s, waiting


@dataclass(frozen=True)
class Judgement:
    """What was found and done. `may_ping`: systemd may be told that all is well. `error`: the process has to end with it."""

    stuck: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()
    error: StuckError | None = None

    @property
    def may_ping(self) -> bool:
        """No stage is stuck."""
        return not self.stuck


class Watchdog:
    """Judges by the stages' own words. `hooks`: how a stage is restarted alone, by its name; to be called from one thread."""

    def __init__(self, counts: RestartCounts, hooks: Mapping[str, Callable[[], None]]) -> None:
        self._counts, self._hooks = counts, hooks
        self._restarts: dict[str, deque[float]] = {}

    def judge(
        self, stages: Mapping[str, StageHealth], now_s: float, waiting: Mapping[str, str] | None = None
    ) -> Judgement:
        """Acts on what is stuck.

        Args:
            now_s: of the monotonic clock.
            waiting: by stage, what waits before it, for the message: `5 frames wait`.
        """
        stuck = tuple(name for name, stage in stages.items() if stage.state == "stuck")
        restarted: list[str] = []
        for name in stuck:
            why = self._treat(name, now_s, restarted)
            if why is not None:
                self._counts.add(PROCESS)
                words = (waiting or {}).get(name, "work waits")
                others = [other for other in stuck if other != name]
                if others:
                    words += f" (also stuck: {', '.join(others)})"
                return Judgement(stuck, tuple(restarted), StuckError(name, stages[name].age_s, words, why))
        return Judgement(stuck, tuple(restarted))

    def _treat(self, name: str, now_s: float, restarted: list[str]) -> str | None:
        """Restarts the stage, waits for an earlier restart to take, or says why the process must end."""
        hook = self._hooks.get(name)
        if hook is None:
            return "it cannot be restarted alone"
        times = self._restarts.setdefault(name, deque())
        while times and now_s - times[0] > WITHIN_S:
            times.popleft()
        if times and now_s - times[-1] < SETTLE_S:
            return None
        if len(times) >= MAX_RESTARTS:
            return f"{len(times)} restarts within {WITHIN_S:g} s did not cure it"
        times.append(now_s)
        self._counts.add(name)
        restarted.append(name)
        log.warning("W-STUCK stage %s is stuck, restart %d of %d within %g s", name, len(times), MAX_RESTARTS, WITHIN_S)
        try:
            hook()
        except Exception:
            log.exception("restarting stage %s failed", name)
        return None


def end_at_latest(timeout_s: float) -> None:
    """Ends this process with exit code 1 after `timeout_s`, whatever hangs in it, with each thread's stack on stderr.

    faulthandler's own thread needs neither the interpreter's lock nor a living main thread: what is stuck in a driver cannot stop it.
    """
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=sys.__stderr__ or sys.stderr)


def cancel_end() -> None:
    """Takes `end_at_latest` back: the process ended its work by itself."""
    faulthandler.cancel_dump_traceback_later()
