"""The parent's handle of a camera process: starts it, talks to it, takes pictures out of its ring, ends it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from devices.errors import CameraError
from devices.frame import Fault, Frame
from devices.frame_checks import MAX_PIXELS
from devices.ring import RingReader
from devices.triggers import Shot

MESSAGE_BYTES = 1 << 16
MAX_TOKENS = 200  # in one message
REAP_S = 2.0
SHOT = ord("S")
GONE: dict[str, Any] = {"event": "gone"}
NOTHING = np.zeros((0, 0, 3), np.uint8)
ROOT = Path(__file__).resolve().parent.parent
# What decoders and drivers may need; the rest may be passwords of the line, and decoders are what attackers try first.
KEPT_VARIABLES = {"PATH", "HOME", "LANG", "TMPDIR", "TZ", "VIRTUAL_ENV", "http_proxy", "https_proxy", "no_proxy"}
KEPT_PREFIXES = ("LC_", "LD_", "PYTHON", "OPENCV_", "OMP_", "GST_")


class Child:
    """One camera process. `kind` is its trigger's. Not shared between threads, except `tell`."""

    def __init__(self, start: dict[str, Any], kind: str) -> None:
        self._kind = kind
        with contextlib.ExitStack() as undo:
            self._ring = RingReader()
            undo.callback(self._ring.close)
            self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self._link.close)
            self._errors = os.memfd_create("camera-stderr")
            undo.callback(os.close, self._errors)
            with theirs:
                self._process = self._spawn(theirs)
            undo.pop_all()
        self._polls: dict[int | None, select.poll] = {None: select.poll()}
        self._polls[None].register(self._link, select.POLLIN)
        self.pid = self._process.pid
        self.tell(start)

    def _spawn(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        files = (theirs.fileno(), self._ring.files.memory, self._ring.files.credits)
        return subprocess.Popen(
            # -P: what lies in the working folder is not imported
            [sys.executable, "-P", "-m", "devices.camera_process", str(os.getpid()), *map(str, files)],
            pass_fds=files,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=_environment(),
            process_group=0,  # Ctrl-C in a terminal goes to the line, which stops its cameras in order
        )

    def tell(self, message: dict[str, Any]) -> None:
        """Sends; a child that is dead, or has not listened for hundreds of messages, is found out by its silence."""
        with contextlib.suppress(OSError):
            self._link.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def tell_tokens(self, tokens: list[tuple[str, float]]) -> None:
        """Sends what an mqtt trigger still has to answer."""
        for start in range(0, len(tokens), MAX_TOKENS):
            self.tell({"fire": tokens[start : start + MAX_TOKENS]})

    def receive(self, timeout_s: float, wake: int | None = None) -> dict[str, Any] | Shot | None:
        """The next message; GONE after the last one; None after `timeout_s`, or when the eventfd `wake` is set.

        Raises:
            CameraError: C-CRASH where the child breaks the protocol.
        """
        data = self._take()
        if data is None:
            self._wait(timeout_s, wake)
            data = self._take()
        if data is None:
            return None
        try:
            return self._read(data) if data else GONE
        except (ValueError, KeyError, IndexError, OSError, struct.error) as error:
            raise CameraError("C-CRASH", f"the camera process sends what cannot be read: {error!r}") from None

    def _read(self, data: bytes) -> dict[str, Any] | Shot:
        if data[0] == SHOT:
            slot = self._ring.read(data[1])
            return Shot(slot.frame, self._kind, slot.trigger_id, data[2:].decode() or None)
        message: dict[str, Any] = json.loads(data)
        if message["event"] == "ring":
            self._ring.attach(message["slot_bytes"])
        if message["event"] == "shot":
            code, detail = message["fault"]
            frame = Frame(NOTHING, message["index"], message["at"], Fault(code, detail))
            return Shot(frame, self._kind, message["id"], message["token"])
        return message

    def _take(self) -> bytes | None:
        for _ in range(2):
            try:
                return self._link.recv(MESSAGE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except ConnectionResetError:
                continue  # it died with messages unread; its own are still there
        return b""

    def _wait(self, timeout_s: float, wake: int | None) -> None:
        limit_ms = None if math.isinf(timeout_s) else max(0.0, timeout_s) * 1000
        if wake is not None and wake not in self._polls:
            self._polls[wake] = select.poll()
            self._polls[wake].register(self._link, select.POLLIN)
            self._polls[wake].register(wake, select.POLLIN)
        self._polls[wake].poll(limit_ms)

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends it now: the only sure cure for a read that hangs."""
        self._process.kill()

    def counts(self) -> tuple[int, int]:
        """(frames read, shots skipped) since its start; exact to the last frame before a kill."""
        return self._ring.counts()

    def rest(self) -> Iterator[Shot]:
        """The shots that a killed child had finished."""
        with contextlib.suppress(CameraError):
            while (message := self.receive(REAP_S)) is not None and message is not GONE:
                if isinstance(message, Shot):
                    yield message

    def why_gone(self) -> CameraError:
        """C-CRASH with what is known of its end."""
        try:
            code = self._process.wait(REAP_S)
        except subprocess.TimeoutExpired:
            return CameraError("C-CRASH", "the camera process closed its connection and goes on")
        if code < 0:
            return CameraError("C-CRASH", f"the camera process was ended by {signal.Signals(-code).name}")
        lines = os.pread(self._errors, MESSAGE_BYTES, 0).decode("utf-8", "replace").strip().splitlines()
        return CameraError(
            "C-CRASH", f"the camera process ended with exit code {code}" + (f": {lines[-1]}" if lines else "")
        )

    def close(self) -> None:
        """Kills it if it still runs, and gives everything back. A process that sleeps inside the kernel is left to its fate."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(REAP_S)
        self._link.close()
        self._ring.close()
        os.close(self._errors)


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k in KEPT_VARIABLES or k.startswith(KEPT_PREFIXES)}
    kept.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
    kept.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    kept.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if ROOT.name not in {"site-packages", "dist-packages"}:
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    return kept
