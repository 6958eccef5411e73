"""What is done with a part after its result is on disk, away from the line: drift, the reservoir of embeddings, the ring of novel frames.

    commit thread --committed--> bounded queue --> one thread --> every follower, one after the other

The line never waits for it: a part that finds no room is left out and counted. A follower that raises is switched off; line and others go on.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from edge_dkm.pipeline import Outcome
from edge_dkm.results import Case

MAX_WAITING = 64  # parts
MAX_WAITING_BYTES = 64_000_000  # of their pictures; one alone may be larger
SAY_EVERY_S = 60.0  # how often the log counts what was left out

log = logging.getLogger(__name__)


class Follower(Protocol):
    """Who does something with parts that have passed."""

    def wants_image(self, outcome: Outcome) -> bool:
        """Whether `follow` needs this part's picture, which costs a copy. Asked once for every part that is followed, in order.

        Called by the committing thread: no waiting, no disk.
        """

    def follow(self, outcome: Outcome) -> None:
        """On the thread of Afterwards. `outcome.image` is a copy that cannot be written to, or None where this follower did not want it."""

    def close(self) -> None:
        """The last call, on the same thread."""


@dataclasses.dataclass
class _Followed:
    follower: Follower
    is_on: bool = True

    @property
    def name(self) -> str:
        return type(self.follower).__name__

    def switch_off(self, where: str) -> None:
        self.is_on = False
        log.exception("%s failed in %s and is switched off until the next start; the line goes on", self.name, where)


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """A part without its picture, a copy of that, and who wanted it."""

    outcome: Outcome
    image: np.ndarray | None
    wants: list[_Followed]

    @property
    def n_bytes(self) -> int:
        return 0 if self.image is None else self.image.nbytes

    def outcome_for(self, followed: _Followed) -> Outcome:
        is_wanted = any(followed is who for who in self.wants)
        return dataclasses.replace(self.outcome, image=self.image) if is_wanted else self.outcome


class Afterwards:
    """An observer of the pipeline (edge_dkm/pipeline.py) that hands parts to its followers. `add` them before `start`."""

    def __init__(self, followers: Sequence[Follower] = ()) -> None:
        self._followers = [_Followed(follower) for follower in followers]
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._left_out = self._said = 0
        self._say_due_s = 0.0
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="afterwards", daemon=True)

    def add(self, follower: Follower) -> None:
        """One more, called in the order of adding."""
        self._followers.append(_Followed(follower))

    def start(self) -> None:
        """Starts the thread; without followers there is none."""
        if self._followers:
            self._thread.start()

    @property
    def left_out(self) -> int:
        """Parts that no follower saw, since the queue was full. Their results are not touched by that."""
        return self._left_out

    def armed(self, case: Case) -> None:
        """Nothing follows from a trigger alone."""

    def committed(self, outcome: Outcome) -> None:
        """Takes the part where there is room. Never waits and never raises: the thread that calls it carries the line."""
        if not any(followed.is_on for followed in self._followers):
            return
        with self._changed:
            n_bytes = outcome.image.nbytes if outcome.image is not None else 0
            is_full = len(self._waiting) >= MAX_WAITING
            is_full |= bool(self._waiting) and self._waiting_bytes + n_bytes > MAX_WAITING_BYTES
            if self._is_closing or is_full:
                self._left_out += 1
                return
        # Copied by the only thread that adds, so there is still room; the camera's ring takes its picture back after this call.
        waiting = self._private(outcome)
        with self._changed:
            self._waiting.append(waiting)
            self._waiting_bytes += waiting.n_bytes
            self._changed.notify()

    def close(self, patience_s: float = 5.0) -> bool:
        """Follows what waits, closes the followers and ends the thread; False where that did not happen within `patience_s`."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.ident is None:
            self._close_followers()
            return True
        self._thread.join(patience_s)
        return not self._thread.is_alive()

    def _private(self, outcome: Outcome) -> _Waiting:
        wants = [followed for followed in self._followers if followed.is_on and self._wants(followed, outcome)]
        image = None if outcome.image is None or not wants else np.array(outcome.image)
        if image is not None:
            image.flags.writeable = False
        return _Waiting(dataclasses.replace(outcome, image=None), image, wants)

    def _wants(self, followed: _Followed, outcome: Outcome) -> bool:
        try:
            return followed.follower.wants_image(outcome)
        except Exception:  # noqa: BLE001 (it would stop the line)
            followed.switch_off("wants_image")
            return False

    def _run(self) -> None:
        while (waiting := self._next()) is not None:
            for followed in self._followers:
                if not followed.is_on:
                    continue
                try:
                    followed.follower.follow(waiting.outcome_for(followed))
                except Exception:  # noqa: BLE001 (the others go on)
                    followed.switch_off("follow")
            del waiting  # while this waits for the next part, it must not hold a picture
            self._say_left_out()
        self._say_left_out(is_last=True)
        self._close_followers()

    def _next(self) -> _Waiting | None:
        """None once closed and nothing waits."""
        with self._changed:
            while not self._waiting:
                if self._is_closing:
                    return None
                self._changed.wait()
            waiting = self._waiting.popleft()
            self._waiting_bytes -= waiting.n_bytes
            return waiting

    def _say_left_out(self, is_last: bool = False) -> None:
        """By this thread, since writing a log may wait for a disk."""
        now_s, left_out = time.monotonic(), self._left_out
        if left_out == self._said or (now_s < self._say_due_s and not is_last):
            return
        log.warning(
            "%d parts since the last word on it (%d since the start) were left out of drift, reservoir and novel frames: "
            "they come faster than these follow; results are complete",
            left_out - self._said,
            left_out,
        )
        self._said, self._say_due_s = left_out, now_s + SAY_EVERY_S

    def _close_followers(self) -> None:
        for followed in self._followers:
            try:
                followed.follower.close()
            except Exception:
                log.exception("%s failed when it was closed", followed.name)
