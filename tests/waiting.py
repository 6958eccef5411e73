"""Waits for another thread or process where it offers no event."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(is_so: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Returns as soon as `is_so()`; fails after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"did not happen within {timeout_s} s")
        time.sleep(0.01)
