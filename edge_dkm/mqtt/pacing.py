"""When a consumer that says nothing gets its rows again, and how fast a backlog goes out beside live results."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

SILENCE_FIRST_S, SILENCE_MAX_S = 1.5, 30.0
FOREVER_S = 3600.0


@dataclass
class Silence:
    """Rows that were sent and that the consumer has not acknowledged, in order; silence makes us send them again."""

    waiting: deque[int] = field(default_factory=deque)
    heard_s: float = field(default_factory=time.monotonic)
    patience_s: float = field(default_factory=lambda: SILENCE_FIRST_S)

    def acknowledged(self, upto: int) -> bool:
        """Whether that was news; a consumer that repeats itself is as stuck as a silent one."""
        before = len(self.waiting)
        while self.waiting and self.waiting[0] <= upto:
            self.waiting.popleft()
        if len(self.waiting) == before:
            return False
        self.heard_s, self.patience_s = time.monotonic(), SILENCE_FIRST_S
        return True

    @property
    def is_lasting(self) -> bool:
        """Whether rows were sent again already, in vain."""
        return self.patience_s > SILENCE_FIRST_S

    def due_s(self) -> float:
        """Seconds until the silence is too long."""
        return max(0.0, self.heard_s + self.patience_s - time.monotonic()) if self.waiting else FOREVER_S

    def rewind(self) -> None:
        """All goes out once more, and the patience doubles."""
        self.waiting.clear()
        self.heard_s, self.patience_s = time.monotonic(), min(2 * self.patience_s, SILENCE_MAX_S)


class Pace:
    """At most `per_s` rows per second in the long run, and a tenth of that at once.

    Brokers acknowledge faster than consumers read: an unpaced backlog fills the consumer's queue at the broker, and new results wait
    behind it or are dropped there.
    """

    def __init__(self, per_s: float) -> None:
        self._per_s, self._burst = per_s, max(1.0, per_s / 10)
        self._tokens, self._at_s = self._burst, time.monotonic()

    def room(self) -> int:
        """How many rows may go out now."""
        now_s = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        return int(self._tokens)

    def spend(self) -> None:
        """One went out."""
        self._tokens -= 1

    def due_s(self) -> float:
        """Seconds until the next one may."""
        return max(0.0, (1 - self._tokens) / self._per_s)
