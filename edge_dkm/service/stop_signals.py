"""SIGINT and SIGTERM as a wish to stop, for what must end in order: the start of a line and the line itself."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def stop_signals(asked: threading.Event, then: Callable[[], None]) -> Iterator[None]:
    """The first signal sets `asked` and calls `then`, a second one ends at once. Elsewhere than in the main thread, nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        then()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
