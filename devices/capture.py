"""One thread per camera: opens the source, cuts the ROI, runs the trigger, hands over shots; reopens a live camera that is gone.

`edge_dkm.pipeline` starts one per camera of a line; `observe` alone serves `edge-dkm record`, which wants every frame.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from devices.errors import CameraError
from devices.frame import Cropper, Fault, Frame
from devices.settings import CameraSettings
from devices.sources import Source, is_live, mask, open_source
from devices.triggers import TRIGGERS, Shot, Trigger

RECONNECT_FIRST_S, RECONNECT_MAX_S = 0.5, 10.0
FPS_WINDOW_S = 2.0

log = logging.getLogger(__name__)
CameraState = Literal["online", "offline", "bad"]


@dataclass(frozen=True)
class Observation:
    """One frame, cropped, with what the trigger made of it: the shot it completes, and the id of the part in view."""

    frame: Frame
    full_size: tuple[int, int]
    present_id: int | None
    shot: Shot | None


def build_trigger(settings: CameraSettings) -> Trigger:
    """The trigger of the camera's settings."""
    return TRIGGERS[settings.trigger.kind](settings.trigger, settings.roi)


def observe(source: Source, settings: CameraSettings, trigger: Trigger) -> Iterator[Observation]:
    """Every frame of an open source, cropped and shown to the trigger."""
    cropper = Cropper(settings.roi)
    for given in source:
        full = _checked(given)
        frame = cropper(full)
        shot = trigger.update(frame)
        yield Observation(frame, (full.image.shape[1], full.image.shape[0]), trigger.present_id, shot)


def _checked(frame: Frame) -> Frame:
    """A driver that gives another kind of picture gives bad frames, not an error in whoever looks at them first."""
    image = frame.image
    if frame.fault is not None or (image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8):
        return frame
    return replace(
        frame,
        image=np.zeros((0, 0, 3), np.uint8),
        fault=Fault("F-SHAPE", f"the camera gives {image.dtype} {image.shape}, expected uint8 (H, W, 3) BGR"),
    )


@dataclass(frozen=True)
class CameraStatus:
    """`code` and `detail` say why a camera is offline; `frame_age_ms` is the time since its last frame."""

    state: CameraState
    fps: float
    frame_age_ms: int | None
    reconnects: int
    frames: int
    code: str | None = None
    detail: str | None = None


class Capture(threading.Thread):
    """Delivers the shots of one camera to `emit`, in order, from its own thread; `emit` may block (then frames wait in the camera).

    `changed` is called when the camera goes online or offline; `ended` is set when a recorded source is finished, or failed for good.
    """

    def __init__(
        self, name: str, settings: CameraSettings, emit: Callable[[str, Shot], None], changed: Callable[[str], None]
    ) -> None:
        super().__init__(name=f"cam:{name}", daemon=True)
        self.camera, self.settings = name, settings
        self.ended = threading.Event()
        self.error: CameraError | None = None
        self.frame_size: tuple[int, int] | None = None
        self._emit, self._changed = emit, changed
        self._trigger = build_trigger(settings)
        self._stop_asked = threading.Event()
        self._source: Source | None = None
        self._state: CameraState = "offline"
        self._code: str | None = None
        self._detail: str | None = None
        self._frames = self._reconnects = 0
        self._last_frame_s: float | None = None
        self._window: tuple[float, int] = (time.monotonic(), 0)
        self._fps = 0.0

    @property
    def stands_for_part(self) -> bool:
        """Whether each shot is a part that must not be lost."""
        return self._trigger.stands_for_part

    def status(self) -> CameraStatus:
        """How the camera is, now."""
        age_ms = None if self._last_frame_s is None else round((time.monotonic() - self._last_frame_s) * 1000)
        fps = round(self._fps, 1) if self._state == "online" else 0.0
        return CameraStatus(self._state, fps, age_ms, self._reconnects, self._frames, self._code, self._detail)

    def stop(self) -> None:
        """Asks the thread to end; a read that hangs in the driver is left behind with it (the thread is a daemon)."""
        self._stop_asked.set()
        source = self._source
        if source is not None:
            source.close()

    def run(self) -> None:
        try:
            self._run()
        finally:
            self.ended.set()
            self._changed(self.camera)

    def _run(self) -> None:
        pause_s = RECONNECT_FIRST_S
        while not self._stop_asked.is_set():
            frames_before = self._frames
            try:
                self._source = open_source(self.settings)
                self._stream(self._source)
                if not self._source.live:
                    return
                raise CameraError("C-LOST", f"{mask(self.settings.source)} gives no more frames")
            except Exception as caught:  # noqa: BLE001 (a thread that ends unseen is a silent stall)
                if self._stop_asked.is_set():
                    return
                error = _as_camera_error(caught, self.settings.source)
                self._go("offline", error)
                if not is_live(self.settings.source):
                    self.error = error
                    return
            if self._frames > frames_before:
                pause_s = RECONNECT_FIRST_S
            self._trigger.reset()
            self._reconnects += 1
            self._stop_asked.wait(pause_s * random.uniform(0.8, 1.2))
            pause_s = min(2 * pause_s, RECONNECT_MAX_S)

    def _stream(self, source: Source) -> None:
        for observation in observe(source, self.settings, self._trigger):
            if self._stop_asked.is_set():
                return
            self._count(observation)
            if observation.shot is not None:
                self._emit(self.camera, observation.shot)

    def _count(self, observation: Observation) -> None:
        now_s = time.monotonic()
        self._frames += 1
        self._last_frame_s = now_s
        started_s, counted = self._window
        self._window = (started_s, counted + 1)
        if now_s - started_s >= FPS_WINDOW_S:
            self._fps, self._window = (counted + 1) / (now_s - started_s), (now_s, 0)
        if observation.frame.fault is None:
            if self.frame_size is not None and observation.full_size != self.frame_size:
                raise CameraError(
                    "C-CHANGED",
                    f"frames were {_size(self.frame_size)} and are now {_size(observation.full_size)}; another camera or mode?",
                )
            self.frame_size = observation.full_size
        if self._state != "online":
            self._go("online", None)

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


def _as_camera_error(error: Exception, source: str) -> CameraError:
    """Whatever a driver or file system raises is the camera's failure, and treated as one."""
    if isinstance(error, CameraError):
        return error
    return CameraError("C-LOST", f"{mask(source)} failed: {type(error).__name__}: {error}")


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
