"""One camera in a process of its own: `python -m devices.camera_process SOCKET MEMORY CREDITS`, started by `devices.child`.

It opens the source, hides what the mask hides, checks, crops, runs the trigger, and sends shots through the ring and small messages
through the socket. Settings come through the socket too: they hold passwords, and anybody can read a command line.
Whatever goes wrong here, a crash of a decoder included, is this camera's alone; the parent may kill it at any time.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from typing import Any

from devices.errors import CameraError
from devices.frame import Fault
from devices.observation import Observation, build_trigger, observe
from devices.ring import RingFiles, RingWriter
from devices.settings import CameraSettings
from devices.sources import Source, is_live, mask, open_source
from devices.sources.decoder_words import WORDS
from devices.triggers import Shot, Trigger

MESSAGE_BYTES = 1 << 16
PROGRESS_EVERY_S = 0.2
BURST_S = 0.05
BAD_AFTER = 5  # faulty frames in a row make a camera bad
GOOD_AFTER = 5  # frames in a row without a fault make it good again: one of six is no recovery
MAX_TEXT = 2000
PR_SET_PDEATHSIG = 1


class CameraProcess:
    """The main thread reads frames; a second one listens to the parent."""

    def __init__(self, link: socket.socket, files: RingFiles) -> None:
        self._link, self._ring = link, RingWriter(files)
        start = self._receive()
        self._settings = CameraSettings.model_validate(start["settings"])
        self._size: tuple[int, int] | None = tuple(start["size"]) if start["size"] else None
        self._trigger: Trigger = build_trigger(self._settings)
        self._trigger.count_from(start["next_id"])
        self._live = is_live(self._settings.source)
        self._may_skip = self._live and self._settings.policy == "latest" and not self._trigger.stands_for_part
        self._open_again, self._stopping = threading.Event(), threading.Event()
        self._source: Source | None = None
        self._frames = self._skipped = 0
        self._faulty_in_a_row: list[Fault] = []
        self._good_in_a_row = 0
        self._told_s, self._seen_s = 0.0, 0.0
        self._told_fault = self._is_skipping = False

    def run(self) -> None:
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        self._tell(event="ready")
        while not self._stopping.is_set():
            try:
                self._stream()
                if self._stopping.is_set():
                    return
                if not self._live:
                    self._tell_progress(event="ended")
                    return
                raise CameraError("C-LOST", f"{mask(self._settings.source)} gives no more frames")
            except Exception as caught:  # noqa: BLE001 (the parent tells people)
                error = _as_camera_error(caught, self._settings.source)
                self._tell_progress(event="error", code=error.code, detail=error.detail[:MAX_TEXT])
                del caught, error
            self._source = None
            if not self._live:
                return
            self._trigger.reset()
            self._open_again.wait()
            self._open_again.clear()

    def _stream(self) -> None:
        self._faulty_in_a_row, self._good_in_a_row, self._told_fault = [], 0, False
        self._source = open_source(self._settings)
        if self._stopping.is_set():
            return
        self._tell(event="connected")
        is_first = True
        with contextlib.closing(observe(self._source, self._settings, self._trigger)) as observations:
            for observation in observations:
                if self._stopping.is_set():
                    return
                self._note(observation, is_first)
                is_first = False
                if observation.shot is not None:
                    self._deliver(observation.shot)

    def _note(self, observation: Observation, is_first: bool) -> None:
        """Counts the frame and tells the parent a few times a second that there are frames."""
        frame = observation.frame
        self._frames += 1
        self._ring.count(self._frames, self._skipped)
        self._seen_s = frame.mono_s
        had_size = self._size is not None
        if frame.fault is None:
            self._good_in_a_row += 1
            if not self._is_bad or self._good_in_a_row >= GOOD_AFTER:
                self._faulty_in_a_row = []
            if self._size is not None and observation.full_size != self._size:
                raise CameraError(
                    "C-CHANGED",
                    f"frames were {_text(self._size)} and are now {_text(observation.full_size)}; another camera or mode?",
                )
            self._size = observation.full_size
        else:
            self._good_in_a_row = 0
            if len(self._faulty_in_a_row) < BAD_AFTER:
                self._faulty_in_a_row.append(frame.fault)
        is_news = is_first or self._is_bad != self._told_fault or had_size != (self._size is not None)
        if is_news or time.monotonic() - self._told_s >= PROGRESS_EVERY_S:
            self._tell_progress(event="progress")

    @property
    def _is_bad(self) -> bool:
        return len(self._faulty_in_a_row) >= BAD_AFTER

    def _deliver(self, shot: Shot) -> None:
        frame = shot.frame
        if frame.fault is not None:
            fault = [frame.fault.code, frame.fault.detail[:MAX_TEXT]]
            self._tell(
                event="shot", id=shot.trigger_id, index=frame.index, at=frame.mono_s, fault=fault, token=shot.token
            )
            return
        # A burst may find the parent asleep; one that stays away must not hold up the camera, whose frames would grow old.
        patience_s = None if not self._may_skip else 0.0 if self._is_skipping else BURST_S
        self._is_skipping = not self._ring.acquire(patience_s)
        if self._is_skipping:
            self._skipped += 1
            self._ring.count(self._frames, self._skipped)
            return
        if self._stopping.is_set():
            return  # what was acquired may be no free slot
        slot_bytes = self._ring.allocate(frame.image)
        if slot_bytes is not None:
            self._tell(event="ring", slot_bytes=slot_bytes)
        slot = self._ring.write(frame, shot.trigger_id)
        self._send(b"S" + bytes([slot]) + (shot.token or "").encode())

    def _tell_progress(self, **message: object) -> None:
        fault = self._faulty_in_a_row[-1] if self._is_bad else None
        self._told_s, self._told_fault = time.monotonic(), fault is not None
        self._tell(
            **message,
            at=self._seen_s,
            size=self._size,
            fault=None if fault is None else [fault.code, fault.detail[:MAX_TEXT]],
        )

    def _tell(self, **message: object) -> None:
        self._send(json.dumps(message).encode())

    def _send(self, data: bytes) -> None:
        try:
            self._link.send(data)
        except OSError:
            os._exit(0)  # the parent is gone

    def _receive(self) -> dict[str, Any]:
        data = self._link.recv(MESSAGE_BYTES)
        if not data:
            os._exit(0)
        message: dict[str, Any] = json.loads(data)
        return message

    def _listen(self) -> None:
        """Ends the process with its parent, even while a read hangs in a driver."""
        try:
            while True:
                self._obey(self._receive())
        except BaseException:  # noqa: BLE001 (without ears it would be a process that nobody can stop)
            os._exit(1)

    def _obey(self, message: dict[str, Any]) -> None:
        for token, fired_s in message.get("fire", ()):
            self._trigger.fire(token, fired_s)
        for token in message.get("withdraw", ()):
            self._trigger.withdraw(token)
        if message.get("stop"):
            self._stopping.set()
            source = self._source
            if source is not None:
                source.close()
            self._ring.wake()
            self._open_again.set()
        if message.get("open"):
            self._open_again.set()


def _as_camera_error(error: Exception, source: str) -> CameraError:
    """Whatever a driver or file system raises is the camera's failure, and treated as one."""
    if isinstance(error, CameraError):
        return error
    return CameraError(
        "C-LOST", f"{mask(source)} failed: {type(error).__name__}: {error}".replace(source, mask(source))
    )


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _tie_to_parent(parent: int) -> None:
    """Ctrl-C is the parent's to handle; its death is ours; a crash leaves no file with pictures and passwords."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)  # it died before the line above
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(arguments: list[str]) -> None:
    """Runs until the source ends, the parent says so, or is gone."""
    parent, link, memory, credit = (int(argument) for argument in arguments)
    _tie_to_parent(parent)
    process = CameraProcess(socket.socket(fileno=link), RingFiles(memory, credit))
    # From here on errors go through the socket; decoders would fill standard error, and print addresses with passwords.
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    WORDS.allow()
    process.run()
    os._exit(0)  # drivers' threads are not waited for


if __name__ == "__main__":
    main(sys.argv[1:])
