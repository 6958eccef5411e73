"""The end of a process while a thread is inside a provider, which nothing interrupts: taking the interpreter down around it may crash.

So the process leaves without that, with the exit code that it was about to have.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading

_exit_code = 1  # where nobody notes another


def ends_with(code: int) -> int:
    """Notes the exit code that the process is about to have, and returns it."""
    global _exit_code
    _exit_code = code
    return code


def leave_at_end(thread: threading.Thread) -> None:
    """Where the thread still runs at the end of the process, the process ends without taking the interpreter down."""
    atexit.register(_leave, thread)


def _leave(thread: threading.Thread) -> None:
    if not thread.is_alive():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_exit_code)
