"""SIGINT and SIGTERM as a wish to stop, for what must end in order: the start of a line, the line itself, and all that lies between."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class StopWish:
    """Whether a signal asked to stop, and who is to hear of it; that changes while a line starts and runs, and the wish is never lost."""

    def __init__(self) -> None:
        self.is_asked = False
        self._then: Callable[[], None] = lambda: None

    def call(self, then: Callable[[], None]) -> None:
        """From now on `then` is called by the signal; at once, where one has come already."""
        self._then = then
        if self.is_asked:
            then()

    def ask(self) -> None:
        """As a signal does."""
        self.is_asked = True
        self._then()


@contextlib.contextmanager
def stop_signals() -> Iterator[StopWish]:
    """The first signal is a wish, a second one ends at once. Elsewhere than in the main thread, nothing is changed."""
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if wish.is_asked:
            raise KeyboardInterrupt
        wish.ask()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wish
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
