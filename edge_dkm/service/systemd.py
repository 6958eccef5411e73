"""What systemd hears from a service of Type=notify: ready, watchdog, status, stopping. Without systemd every call does nothing."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

MAX_STATUS = 200
SEND_S = 1.0  # a system manager that hangs must not hang the line

log = logging.getLogger(__name__)


class Notifier:
    """Speaks to the socket that `$NOTIFY_SOCKET` names. Nothing is raised: a lost word to systemd must not stop a line."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        name = environ.get("NOTIFY_SOCKET", "")
        # `@` stands for the NUL byte of the abstract name space.
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._interval_s = _interval_s(environ) if self.is_there else None
        self._complained = False

    @property
    def is_there(self) -> bool:
        """Whether systemd listens."""
        return self._address.startswith(("/", "\0"))

    @property
    def ping_every_s(self) -> float | None:
        """How often `watchdog` is due: a third of WatchdogSec, at most 10 s; None where no watchdog waits for this process."""
        return min(10.0, self._interval_s / 3) if self._interval_s else None

    def ready(self) -> None:
        """Models proven, database open."""
        self._send("READY=1")

    def watchdog(self) -> None:
        """Nothing is stuck."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send("STATUS=" + " ".join(text.split())[:MAX_STATUS])

    def stopping(self) -> None:
        """The end was asked for or decided on."""
        self._send("STOPPING=1")

    def extend_start(self, seconds: float) -> None:
        """The start takes longer, as where TensorRT builds an engine: so many seconds from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def _send(self, text: str) -> None:
        if not self.is_there:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(SEND_S)
                sender.sendto(text.encode("utf-8", "replace"), self._address)
        except OSError as error:
            if not self._complained:
                log.warning("systemd does not take %s: %s", text.partition("=")[0], error.strerror or error)
            self._complained = True
        else:
            self._complained = False


def _interval_s(environ: Mapping[str, str]) -> float | None:
    """WatchdogSec of this process; what was meant for another process (an inherited environment) does not count."""
    microseconds, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or int(microseconds) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(microseconds) / 1e6
