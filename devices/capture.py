"""The line's side of a camera: a thread that starts the camera's process, takes its shots, and replaces it when it hangs or dies.

`edge_dkm.pipeline` starts one per camera of a line. What happens inside the process is `devices.camera_process`.
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from devices.child import GONE, Child
from devices.errors import CameraError
from devices.observation import Observation, build_trigger, observe
from devices.settings import CameraSettings
from devices.sources import is_live, mask
from devices.triggers import TRIGGERS, Shot

RECONNECT_FIRST_S, RECONNECT_MAX_S = 0.5, 10.0
RECONNECT_KNOWN_MAX_S = 3.0  # a camera that has worked before is back within 5 s of its return
START_TIMEOUT_S = 30.0  # to load Python and OpenCV on a slow, busy device
STOP_GRACE_S = 0.5  # to say goodbye to the camera
FPS_WINDOW_S = 2.0
FOREVER_S = math.inf  # recorded material may take its time

log = logging.getLogger(__name__)
CameraState = Literal["online", "offline", "bad"]


@dataclass(frozen=True)
class CameraStatus:
    """`code` and `detail` say why a camera is offline, or bad (it gives faulty frames only); `frame_age_ms` is the time since its last frame.

    `reconnects` counts attempts to open it again, `restarts` those of them that took a new process.
    """

    state: CameraState
    fps: float
    frame_age_ms: int | None
    reconnects: int
    frames: int
    code: str | None = None
    detail: str | None = None
    restarts: int = 0


@dataclass(frozen=True)
class _Patience:
    """How long the next message may take, and what it means if it takes longer."""

    limit_s: float
    code: str
    text: str


class Capture(threading.Thread):
    """Delivers the shots of one camera to `emit`, in order, from its own thread; `emit` may block (then frames wait in the camera).

    `changed` is called when the camera's state changes; `ended` is set when a recorded source is finished, or failed for good.
    `skipped(camera, n)`: n frames of a live camera found no free slot and were never shots; they count as superseded.
    """

    def __init__(
        self,
        name: str,
        settings: CameraSettings,
        emit: Callable[[str, Shot], None],
        changed: Callable[[str], None],
        skipped: Callable[[str, int], None] | None = None,
    ) -> None:
        super().__init__(name=f"cam:{name}", daemon=True)
        self.camera, self.settings = name, settings
        self.ended = threading.Event()
        self.error: CameraError | None = None
        self.frame_size: tuple[int, int] | None = None
        self._emit, self._changed, self._on_skipped = emit, changed, skipped
        self._live = is_live(settings.source)
        self._is_emitting = False
        self._stop_asked = threading.Event()
        self._lock = threading.Lock()  # guards the child and the tokens against other threads
        self._child: Child | None = None
        self._wake: int | None = None
        self._tokens: dict[str, float] = {}
        self._next_id = 1
        self._state: CameraState = "offline"
        self._code: str | None = None
        self._detail: str | None = None
        self._frames = self._frames_before = self._skipped = self._reconnects = self._children = 0
        self._last_frame_s: float | None = None
        self._handed_over_s = float("-inf")
        self._window: tuple[float, int] = (time.monotonic(), 0)
        self._fps = 0.0

    @property
    def stands_for_part(self) -> bool:
        """Whether each shot is a part that must not be lost."""
        return TRIGGERS[self.settings.trigger.kind].stands_for_part

    @property
    def is_handing_over(self) -> bool:
        """Whether whoever takes the shots is taking one now, or makes it wait."""
        return self._is_emitting

    @property
    def handed_over_age_s(self) -> float:
        """Since the last shot was taken; infinite before the first."""
        return time.monotonic() - self._handed_over_s

    @property
    def is_live(self) -> bool:
        """Whether the source is a camera, not recorded material."""
        return self._live

    @property
    def pid(self) -> int | None:
        """The camera's process, where it has one now."""
        child = self._child
        return child.pid if child else None

    def status(self) -> CameraStatus:
        """How the camera is, now."""
        age_ms = None if self._last_frame_s is None else round((time.monotonic() - self._last_frame_s) * 1000)
        fps = 0.0 if self._state == "offline" else round(self._fps, 1)
        return CameraStatus(
            self._state,
            fps,
            age_ms,
            self._reconnects,
            self._frames,
            self._code,
            self._detail,
            max(0, self._children - 1),
        )

    def fire(self, token: str) -> None:
        """Asks for the next frame captured from now on, as the shot with this token; it waits while the camera is away.

        Raises:
            ValueError: the camera's trigger takes no commands.
        """
        if self.settings.trigger.kind != "mqtt":
            raise ValueError(f"camera {self.camera} has trigger kind {self.settings.trigger.kind}, expected mqtt")
        with self._lock:
            self._tokens[token] = time.monotonic()
            if self._child is not None:
                self._child.tell_tokens([(token, self._tokens[token])])

    def withdraw(self, token: str) -> None:
        """Nobody waits for this token any more (its part is over time): no frame is spent on it."""
        with self._lock:
            if self._tokens.pop(token, None) is not None and self._child is not None:
                self._child.tell({"withdraw": [token]})

    def stop(self) -> None:
        """Asks the camera to end, which takes a moment even when it hangs; `join` waits for it. Parts already shot are still emitted."""
        self._stop_asked.set()
        with self._lock:
            if self._child is not None:
                self._child.tell({"stop": True})
            if self._wake is not None:
                os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        with self._lock:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            self._run()
        except Exception as caught:
            # A thread that ends unseen is a silent stall.
            log.exception("camera %s stops", self.camera)
            self.error = CameraError("C-CRASH", f"{type(caught).__name__}: {caught}")
            self._go("offline", self.error)
        finally:
            self._discard()
            with self._lock:
                os.close(self._wake)
                self._wake = None
            self.ended.set()
            self._changed(self.camera)

    def _run(self) -> None:
        pause_s = RECONNECT_FIRST_S
        while not self._stop_asked.is_set():
            frames_before = self._frames
            error = self._attempt()
            if self._stop_asked.is_set() or error is None:
                return
            self._go("offline", error)
            if not self._live:
                self.error = error
                return
            if self._frames > frames_before:
                pause_s = RECONNECT_FIRST_S
            self._stop_asked.wait(pause_s * random.uniform(0.8, 1.2))
            longest_s = RECONNECT_MAX_S if self.frame_size is None else min(RECONNECT_MAX_S, RECONNECT_KNOWN_MAX_S)
            pause_s = min(2 * pause_s, longest_s)
            self._reconnects += 1

    def _attempt(self) -> CameraError | None:
        """One stream, from opening to its end; None when a recorded source is finished, or `stop` was called."""
        try:
            return self._follow(*self._ready_child())
        except OSError as caught:
            return CameraError("C-CRASH", f"the camera process cannot be started: {caught}")
        except CameraError as caught:  # the child breaks the protocol
            self._discard()
            return caught

    def _ready_child(self) -> tuple[Child, _Patience]:
        """The child that waits for a word to open its source again, or a new one; and how long its first message may take."""
        if self._child is not None and self._child.is_alive():
            self._child.tell({"open": True})
            return self._child, self._opening()
        self._discard()
        settings = self.settings.model_dump(mode="json", exclude={"output"})
        start = {"settings": settings, "size": self.frame_size, "next_id": self._next_id}
        child = Child(start, self.settings.trigger.kind)
        self._children += 1
        self._frames_before, self._skipped = self._frames, 0
        with self._lock:
            self._child = child
            child.tell_tokens(list(self._tokens.items()))
            if self._stop_asked.is_set():
                child.tell({"stop": True})
        return child, _Patience(START_TIMEOUT_S, "C-CRASH", "the camera process does not start")

    def _follow(self, child: Child, patience: _Patience) -> CameraError | None:
        heard_s = time.monotonic()
        while True:
            message = child.receive(heard_s + patience.limit_s - time.monotonic(), self._wake)
            if self._stop_asked.is_set():
                self._say_goodbye(child, message)
                return None
            if message is None:
                if time.monotonic() < heard_s + patience.limit_s:
                    continue
                self._discard()
                return CameraError(patience.code, f"{patience.text} within {patience.limit_s:g} s")
            if message is GONE:
                error = child.why_gone()
                self._discard()
                return error
            if isinstance(message, Shot):
                self._hand_over(message)
            else:
                self._heed(child, message)
                if message["event"] == "ended":
                    return None
                if message["event"] == "error":
                    return CameraError(message["code"], message["detail"])
                patience = self._next_patience(message["event"], patience)
            heard_s = time.monotonic()  # after the shot: while `emit` blocks, the child may have to wait
            message = None  # a shot that is kept here while nothing comes would keep its slot of the ring

    def _opening(self) -> _Patience:
        limit_s = self.settings.open_timeout_s if self._live else FOREVER_S
        return _Patience(limit_s, "C-OPEN-TIMEOUT", f"{mask(self.settings.source)} does not open")

    def _next_patience(self, event: str, before: _Patience) -> _Patience:
        """What to expect after a message. Recorded material may take its time."""
        if event == "ready":
            return self._opening()
        if event == "connected":
            limit_s = self.settings.stall_s if self._live else FOREVER_S
            return _Patience(limit_s, "C-STALL", f"{mask(self.settings.source)} gives no frame")
        return before

    def _hand_over(self, shot: Shot) -> None:
        self._next_id = shot.trigger_id + 1
        if shot.token is not None:
            with self._lock:
                self._tokens.pop(shot.token, None)
        self._is_emitting = True
        try:
            self._emit(self.camera, shot)
        finally:
            self._is_emitting = False
            self._handed_over_s = time.monotonic()

    def _heed(self, child: Child, message: dict[str, Any]) -> None:
        """Takes over what a message says about frames; those of `progress` make the camera online, or bad."""
        self._count(child)
        if message.get("size") is not None:
            self.frame_size = (message["size"][0], message["size"][1])
        if message["event"] == "progress":
            self._last_frame_s = min(message["at"], time.monotonic())
            fault = message["fault"]
            self._go("bad", CameraError(*fault)) if fault else self._go("online", None)

    def _count(self, child: Child) -> None:
        frames, skipped = child.counts()
        self._frames = self._frames_before + frames
        started_s, counted = self._window
        now_s = time.monotonic()
        if now_s - started_s >= FPS_WINDOW_S:
            self._fps, self._window = (self._frames - counted) / (now_s - started_s), (now_s, self._frames)
        news, self._skipped = skipped - self._skipped, skipped
        if news and self._on_skipped is not None:
            self._on_skipped(self.camera, news)

    def _say_goodbye(self, child: Child, message: dict[str, Any] | Shot | None) -> None:
        """Lets the child close its source, for a moment; a part that was already shot is not lost."""
        deadline_s = time.monotonic() + STOP_GRACE_S
        while True:
            if isinstance(message, Shot) and self.stands_for_part:
                self._hand_over(message)
            elif message is GONE or time.monotonic() >= deadline_s:
                return
            message = child.receive(deadline_s - time.monotonic())

    def _discard(self) -> None:
        """Ends the child, after the shots that it had finished."""
        with self._lock:
            child, self._child = self._child, None
        if child is None:
            return
        try:
            child.kill()
            for shot in child.rest():
                if self.stands_for_part or not self._stop_asked.is_set():
                    self._hand_over(shot)
            self._count(child)
        finally:
            child.close()

    def _go(self, state: CameraState, error: CameraError | None) -> None:
        code = error.code if error else None
        if (state, code) == (self._state, self._code):
            return  # the tenth failed attempt says nothing that the first did not
        self._state, self._code, self._detail = state, code, str(error) if error else None
        log.log(
            logging.WARNING if error else logging.INFO,
            "camera %s is %s%s",
            self.camera,
            state,
            f": {error}" if error else "",
        )
        self._changed(self.camera)


__all__ = ["CameraStatus", "Capture", "Observation", "build_trigger", "observe"]
