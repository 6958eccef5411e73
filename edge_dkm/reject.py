"""The reject output of one camera: OK only for a part that was judged OK in time, NG for everything else, including silence.

`arm`, `decide` and `fail` leave a note and return; one thread per output does the writing, so that a slow or dead PLC holds up nobody. The broker has
no say here. What is written is not a queue of old news but what holds now:

    arm(n)  -> NG, whatever part n-1 still had to say
    decide  -> OK, if part n is still the newest, its deadline is not over and NG has been acknowledged since its trigger; else NG
    deadline, fail, hold_ms over, stop, any error -> NG;   every new connection starts with NG
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from devices.outputs import Output, OutputError
from devices.outputs.base import Signal
from edge_dkm.contract import Verdict
from edge_dkm.health import Stage

RETRY_S, MAX_RETRY_S = 0.1, 2.0

log = logging.getLogger(__name__)
Fate = Literal["ok", "ng", "late", "stale", "lost"]
State = Literal["starting", "ok", "degraded", "stopped"]
Step = Literal["ng", "ok", "beat"]


@dataclass
class _Part:
    """One armed part. `deadline_s` on the monotonic clock. `decided`: what the verdict asks for; `is_closed`: its fate is counted."""

    case_id: str
    deadline_s: float | None
    decided: Literal["ok", "ng"] | None = None
    decided_s: float = 0.0
    is_closed: bool = False

    def is_late(self, now_s: float) -> bool:
        return self.deadline_s is not None and now_s >= self.deadline_s


@dataclass(frozen=True)
class RejectStatus:
    """What health and metrics show. `signal` as last acknowledged. armed = ok + ng + late + stale + lost + the one that is open.

    ok: OK acknowledged · ng: judged NG or failed · late: no acknowledged OK by the deadline · stale: the next part came first ·
    lost: the verdict could not be written. `written_ms`: from the last decision to its acknowledgement.
    """

    state: State
    signal: Signal
    code: str | None
    problem: str | None
    armed: int
    ok: int
    ng: int
    late: int
    stale: int
    lost: int
    reconnects: int
    written_ms: float | None


class RejectOutput:
    """See the module. `changed` is called by the output's thread when `state` has changed; `is_line_alive` stops the heartbeat when it says no.

    `stage` counts acknowledged writes. Start it before the cameras, so that NG is the first thing the machine hears.
    """

    def __init__(
        self,
        name: str,
        output: Output,
        changed: Callable[[], None] = lambda: None,
        is_line_alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self.name, self._output = name, output
        self._tell, self._is_line_alive = changed, is_line_alive
        self._changed = threading.Condition()
        self._counts: Counter[Fate] = Counter()
        self._armed, self._reconnects = 0, 0
        self._part: _Part | None = None
        self._is_ng_due = True
        self._hold_until_s: float | None = None
        self._beat_s = 0.0
        self._failures, self._retry_s = 0, 0.0
        self._error: OutputError | None = None
        self._state: State = "starting"
        self._written_ms: float | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=f"output-{name}", daemon=True)
        self.stage = Stage(self._has_work, self._excuse)

    def start(self) -> None:
        """Starts the thread, which connects and writes NG."""
        self._thread.start()

    def arm(self, case_id: str, deadline_s: float | None) -> None:
        """A part's trigger has fired: NG until its verdict. `deadline_s` (monotonic): when the machine looks; None: never too late."""
        with self._changed:
            self._close_part("stale")
            self._part = _Part(case_id, deadline_s)
            self._armed += 1
            self._demand_ng()

    def decide(self, case_id: str, verdict: Verdict) -> None:
        """The part's verdict is on disk. What comes for another part than the newest, or twice, changes nothing."""
        with self._changed:
            part = self._part
            if part is None or part.case_id != case_id or part.is_closed or part.decided is not None:
                return
            part.decided_s = time.monotonic()
            if part.is_late(part.decided_s):
                self._close_part("late")
            else:
                part.decided = "ok" if verdict in self._output.settings.ok else "ng"
                if self._error is not None:
                    self._close_part("lost")
            if part.decided == "ok" and not part.is_closed:
                self._changed.notify_all()
            else:
                self._demand_ng()

    def fail(self, reason: str) -> None:
        """Something upstream broke (camera gone, line stopped): NG now, and for the part that is under way. The next trigger arms anew."""
        log.warning("output %s: NG, since %s", self.name, reason)
        with self._changed:
            self._close_part("ng")
            self._demand_ng()

    def status(self) -> RejectStatus:
        """As of now."""
        with self._changed:
            return RejectStatus(
                state=self._state,
                signal=self._output.signal,
                code=self._error.code if self._error else None,
                problem=self._error.detail if self._error else None,
                armed=self._armed,
                ok=self._counts["ok"],
                ng=self._counts["ng"],
                late=self._counts["late"],
                stale=self._counts["stale"],
                lost=self._counts["lost"],
                reconnects=self._reconnects,
                written_ms=self._written_ms,
            )

    def close(self, patience_s: float = 5.0) -> bool:
        """Leaves NG where the machine can be reached, and ends the thread; False if that did not happen within `patience_s`."""
        with self._changed:
            self._is_closing = True
            self._close_part("ng")
            self._demand_ng()
        if self._thread.ident is None:
            self._output.close()
            return True
        self._thread.join(patience_s)
        return not self._thread.is_alive()

    # What follows holds the lock when it is called, or takes it for a moment; nobody holds it while writing.

    def _demand_ng(self) -> None:
        self._is_ng_due, self._hold_until_s = True, None
        self._changed.notify_all()

    def _close_part(self, fate: Fate) -> None:
        """Counts the part that is under way, once. An NG verdict that is overtaken was an NG all the same."""
        part = self._part
        if part is None or part.is_closed:
            return
        part.is_closed = True
        self._counts["ng" if part.decided == "ng" and fate in ("stale", "late") else fate] += 1

    def _is_ok_due(self) -> bool:
        return self._part is not None and self._part.decided == "ok" and not self._part.is_closed

    def _has_work(self) -> bool:
        return self._is_ng_due or self._is_ok_due()

    def _excuse(self) -> str | None:
        error = self._error
        return None if error is None else str(error)

    def _run(self) -> None:
        try:
            while (step := self._next_step()) is not None:
                self._do(*step)
        except Exception as error:
            log.exception("output %s: its thread ends", self.name)
            self._error = OutputError("O-ERROR", f"the output's thread ended: {type(error).__name__}: {error}")
        finally:
            self._leave_ng()

    def _leave_ng(self) -> None:
        try:
            self._output.set_ng()
        except OutputError as error:
            log.error("output %s could not be left at NG: %s", self.name, error)
        self._output.close()
        self._enter("stopped")

    def _next_step(self) -> tuple[Step, _Part | None] | None:
        """Waits for something to write. None once closed; NG before OK before the heartbeat."""
        with self._changed:
            while not self._is_closing:
                now_s = time.monotonic()
                self._expire(now_s)
                if now_s >= self._retry_s:
                    if self._is_ng_due:
                        self._is_ng_due = False
                        part = self._part
                        return "ng", part if part is not None and part.decided == "ng" else None
                    if self._is_ok_due():
                        return "ok", self._part
                    if self._output.has_heartbeat and now_s >= self._beat_s:
                        self._beat_s = now_s + self._output.settings.heartbeat_s
                        return "beat", None
                self._changed.wait(self._patience_s(now_s))
            return None

    def _expire(self, now_s: float) -> None:
        part = self._part
        if part is not None and not part.is_closed and part.decided != "ng" and part.is_late(now_s):
            self._close_part("late")
            self._demand_ng()
        if self._hold_until_s is not None and now_s >= self._hold_until_s:
            self._demand_ng()

    def _patience_s(self, now_s: float) -> float | None:
        """Seconds until something falls due by itself; None if nothing does."""
        moments = [self._hold_until_s]
        if self._part is not None and not self._part.is_closed and self._part.decided != "ng":
            moments.append(self._part.deadline_s)
        if now_s < self._retry_s:
            moments.append(self._retry_s)
        elif self._output.has_heartbeat:
            moments.append(self._beat_s)
        due_s = min((moment for moment in moments if moment is not None), default=None)
        return None if due_s is None else min(max(0.0, due_s - now_s), threading.TIMEOUT_MAX)

    def _do(self, step: Step, part: _Part | None) -> None:
        was_open = self._output.is_open
        try:
            if step == "ok":
                self._output.set_ok()
            elif step == "ng":
                self._output.set_ng()
            elif self._is_line_alive():
                self._output.beat()
        except OutputError as error:
            self._take_failure(error, was_open, part if step == "ok" else None)
        else:
            self._take_success(step, part, was_open)

    def _take_success(self, step: Step, part: _Part | None, was_open: bool) -> None:
        with self._changed:
            now_s = time.monotonic()
            self._failures, self._retry_s = 0, 0.0
            if not was_open and self._state != "starting" and self._output.is_open:
                self._reconnects += 1
            if step == "ok" and part is not None:
                self._finish_ok(part, now_s)
            elif part is not None and part is self._part:
                self._note_written(part, now_s)
                self._close_part("ng")
            if step == "beat":
                return
            self._error = None
        self.stage.progress()
        self._enter("ok")

    def _finish_ok(self, part: _Part, now_s: float) -> None:
        """OK was acknowledged; while it was under way the next part may have come, or the deadline passed: then NG follows at once."""
        if part is not self._part or part.is_closed:
            return  # what closed it has demanded NG, which is still due
        if part.is_late(now_s):
            self._close_part("late")
            self._demand_ng()
        else:
            self._note_written(part, now_s)
            self._close_part("ok")
            hold_ms = self._output.settings.hold_ms
            self._hold_until_s = None if hold_ms is None else now_s + hold_ms / 1000

    def _note_written(self, part: _Part, now_s: float) -> None:
        self._written_ms = (now_s - part.decided_s) * 1000

    def _take_failure(self, error: OutputError, was_open: bool, passed: _Part | None) -> None:
        """`passed`: the part whose OK was being written; it may have reached the machine or not, and is not tried again."""
        with self._changed:
            self._failures += 1
            self._demand_ng()
            # Machines drop connections that were idle: the trigger's NG finds that out, and the verdict still arrives by a new one.
            is_first = was_open and self._failures == 1 and error.code == "O-LOST"
            if self._part is not None and self._part.decided is not None and (not is_first or passed is self._part):
                self._close_part("lost")
            if is_first:
                return
            self._retry_s = time.monotonic() + min(MAX_RETRY_S, RETRY_S * 2 ** min(self._failures - 1, 10))
            self._error = error
        self._enter("degraded", error)

    def _enter(self, state: State, error: OutputError | None = None) -> None:
        with self._changed:
            before, self._state = self._state, state
        if before == state:
            return
        if error is not None:
            log.warning("output %s cannot be written, parts count as lost: %s", self.name, error)
        elif before != "starting":
            log.info("output %s: %s", self.name, state)
        self._tell()
