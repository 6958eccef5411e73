"""What somebody should look at: raised and cleared once each on the retained `<base>/alarm/<code>`, listed for /readyz and health.

Called from any thread. A broker keeps a raised alarm beyond this process, so the open ones are noted in a file and cleared at start.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edge_dkm.clock import rfc3339, utc_now
from edge_dkm.errors import UsageError
from edge_dkm.message import Alarm
from edge_dkm.set_aside import set_aside

DETAIL_EVERY_S = 10.0
RESTARTED = "the program was restarted; it is raised again where it still holds"
_SLUG = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)

log = logging.getLogger(__name__)
Announce = Callable[[str, Callable[[int], Alarm]], None]


@dataclass(frozen=True)
class ActiveAlarm:
    """A raised alarm. `since`: when it was raised, RFC 3339 UTC."""

    code: str
    detail: str
    since: str
    camera: str | None = None


@dataclass
class _Open:
    alarm: ActiveAlarm
    said_s: float
    is_stale: bool = False  # the detail has changed since it was said


def code_of(code: str, camera: str | None) -> str:
    """The last level of the topic: `C-OFFLINE-top` for camera top, `M-NO-CONSUMER` where no camera is meant."""
    full = code if camera is None else f"{code}-{camera}"
    if not _SLUG.fullmatch(full):
        raise UsageError(f"alarm code is '{full}', expected 1 to 64 of A-Z a-z 0-9 _ -")
    return full


class Alarms:
    """The alarms of one station.

    Args:
        base: the station's topic.
        announce: publishes (topic, message by session counter), retained, QoS 1 (`Publisher.announce`); must not block.
        memory: a file in the state folder for the codes that are open; without one, an alarm that was raised when the process
            died stays on the broker until it is raised and cleared again.
    """

    def __init__(self, base: str, announce: Announce, memory: Path | None = None) -> None:
        self._base, self._announce, self._memory = base, announce, memory
        self._station = base.rsplit("/", 1)[-1]
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        for code, camera in _recall(memory).items():
            self._say(ActiveAlarm(code, RESTARTED, rfc3339(utc_now()), camera), active=False)
        self._note()

    def raise_(self, code: str, detail: str, camera: str | None = None) -> None:
        """Something is wrong. Said at once when it is new; a changed detail at most every ten seconds (see `flush`)."""
        full = code_of(code, camera)
        with self._lock:
            known = self._open.get(full)
            if known is None:
                alarm = ActiveAlarm(full, detail, rfc3339(utc_now()), camera)
                self._open[full] = _Open(alarm, time.monotonic())
                log.warning("alarm %s: %s", full, detail)
                self._say(alarm, active=True)
                self._note()
            elif known.alarm.detail != detail:
                known.alarm, known.is_stale = replace(known.alarm, detail=detail), True
                self._say_again(known)

    def clear(self, code: str, camera: str | None = None, detail: str = "") -> None:
        """It is over. Nothing happens where it was not raised."""
        full = code_of(code, camera)
        with self._lock:
            known = self._open.pop(full, None)
            if known is not None:
                log.info("alarm %s is over", full)
                self._say(replace(known.alarm, since=rfc3339(utc_now()), detail=detail), active=False)
                self._note()

    def set(self, code: str, detail: str | None, camera: str | None = None) -> None:
        """Raises with a detail, clears without one: for conditions that are looked at regularly."""
        if detail is None:
            self.clear(code, camera)
        else:
            self.raise_(code, detail, camera)

    def flush(self) -> None:
        """Says details that changed within the ten seconds; to be called every few seconds."""
        with self._lock:
            for known in self._open.values():
                self._say_again(known)

    def active(self) -> list[ActiveAlarm]:
        """What is raised now, by code."""
        with self._lock:
            return [known.alarm for _, known in sorted(self._open.items())]

    def _say_again(self, known: _Open) -> None:
        now_s = time.monotonic()
        if known.is_stale and now_s - known.said_s >= DETAIL_EVERY_S:
            known.said_s, known.is_stale = now_s, False
            self._say(known.alarm, active=True)

    def _say(self, alarm: ActiveAlarm, active: bool) -> None:
        def build(session: int) -> Alarm:
            return Alarm(
                ts=rfc3339(utc_now()),
                station=self._station,
                session=session,
                code=alarm.code,
                active=active,
                since=alarm.since,
                detail=alarm.detail,
                camera=alarm.camera,
            )

        self._announce(f"{self._base}/alarm/{alarm.code}", build)

    def _note(self) -> None:
        """On change only. A full disk is itself an alarm and must not prevent its own report."""
        if self._memory is None:
            return
        codes = {known.alarm.code: known.alarm.camera for known in self._open.values()}
        with contextlib.suppress(OSError):
            draft = self._memory.with_suffix(".tmp")
            draft.write_text(json.dumps(codes), encoding="utf-8")
            draft.replace(self._memory)


def _recall(memory: Path | None) -> dict[str, str | None]:
    """The codes that were open; of a damaged file, those that can be read."""
    if memory is None:
        return {}
    try:
        found = json.loads(memory.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("expected an object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        with contextlib.suppress(OSError):
            log.warning("S-CORRUPT %s is damaged (%s), moved to %s", memory, error, set_aside(memory))
        return {}
    return {
        code: camera if isinstance(camera, str) else None for code, camera in found.items() if _SLUG.fullmatch(code)
    }
