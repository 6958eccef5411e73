"""A broker as a child process for a first try (`mqtt.host: embedded`): Mosquitto where it is installed, else amqtt. Loopback only."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from edge_dkm.errors import BrokerError
from edge_dkm.set_aside import set_aside
from edge_dkm.settings import EMBEDDED, LineSettings

START_S = 10.0
HOST = "127.0.0.1"
log = logging.getLogger(__name__)


class EmbeddedBroker:
    """Starts the broker and waits until it accepts connections.

    Raises:
        BrokerError: neither broker is installed, the port is taken, or it does not start.
    """

    def __init__(self, port: int, folder: Path) -> None:
        self.port = port
        kind = embedded_kind()
        if _accepts(port):
            raise BrokerError(
                f"port {port} for the embedded broker is taken; set mqtt.port to a free one, or mqtt.host to the broker that runs there"
            )
        if folder.exists() and not folder.is_dir():
            log.warning("S-CORRUPT %s is no folder, moved to %s", folder, set_aside(folder))
        folder.mkdir(parents=True, exist_ok=True)
        command = _mosquitto(port, folder) if kind == "mosquitto" else _amqtt(port, folder)
        self._log = (folder / "broker.log").open("wb")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # a signal to the whole group, as Ctrl-C, must not end it before the line's goodbye
            preexec_fn=_die_with_parent(ctypes.CDLL(None)),  # noqa: PLW1509 (one call into libc, which is loaded here)
        )
        self._await_start(folder / "broker.log")

    def _await_start(self, log_path: Path) -> None:
        deadline_s = time.monotonic() + START_S
        while not _accepts(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.close()
                words = log_path.read_text(errors="replace").strip().splitlines()
                raise BrokerError(
                    f"the embedded broker did not start on port {self.port}: {words[-1] if words else 'no message'}"
                )
            time.sleep(0.02)  # another process's listener: there is no event to wait for

    def close(self) -> None:
        """Stops the broker."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()


def _mosquitto(port: int, folder: Path) -> list[str]:
    config = folder / "mosquitto.conf"
    # As root, Mosquitto would become another user, and by that forget that it is to end with its parent.
    user = "user root\n" if os.geteuid() == 0 else ""
    config.write_text(
        f"{user}listener {port} {HOST}\nallow_anonymous true\npersistence false\nmax_queued_messages 0\nmax_inflight_messages 20\n"
    )
    return [find_mosquitto() or "mosquitto", "-c", str(config)]


def _amqtt(port: int, folder: Path) -> list[str]:
    config = folder / "amqtt.yaml"
    config.write_text(
        f"listeners:\n  default:\n    type: tcp\n    bind: {HOST}:{port}\n"
        "plugins:\n  amqtt.plugins.authentication.AnonymousAuthPlugin:\n    allow_anonymous: true\n"
    )
    log.warning(
        "Mosquitto is not installed: the embedded broker is amqtt, which speaks MQTT 3.1.1 only; refused messages are invisible"
    )
    return [sys.executable, "-m", "amqtt.scripts.broker_script", "-c", str(config)]


def embedded_kind() -> Literal["mosquitto", "amqtt"]:
    """Which broker would be started.

    Raises:
        BrokerError: none is installed.
    """
    if find_mosquitto() is not None:
        return "mosquitto"
    if importlib.util.find_spec("amqtt") is not None:
        return "amqtt"
    raise BrokerError(
        "mqtt.host is embedded, but neither Mosquitto (apt install mosquitto) nor amqtt (pip install 'edge-dkm[demo]') is installed"
    )


def as_embedded_speaks(settings: LineSettings) -> LineSettings:
    """The settings with the MQTT version of the broker that would be started; those of any other broker as they are."""
    if settings.mqtt.host != EMBEDDED or embedded_kind() == "mosquitto":
        return settings
    return settings.model_copy(update={"mqtt": settings.mqtt.model_copy(update={"version": "3.1.1"})})


def find_mosquitto() -> str | None:
    """The path of Mosquitto; Debian puts it where a user's PATH does not look."""
    return shutil.which("mosquitto") or next(
        (path for path in ("/usr/sbin/mosquitto", "/usr/local/sbin/mosquitto") if Path(path).exists()), None
    )


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=0.5):
            return True
    except OSError:
        return False


def _die_with_parent(libc: ctypes.CDLL) -> Callable[[], None]:
    """For the child: it ends with the parent even when that is killed."""

    def prepare() -> None:
        if sys.platform.startswith("linux"):
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    return prepare
