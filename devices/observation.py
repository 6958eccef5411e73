"""What a trigger makes of a camera's frames: masked, checked, cropped. Camera processes run it, and `edge-dkm record`, which wants every frame."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

import numpy as np

from devices.frame import Cropper, Fault, Frame
from devices.frame_checks import FrameChecks
from devices.privacy import PrivacyMask
from devices.settings import CameraSettings
from devices.sources import Source, is_live
from devices.triggers import TRIGGERS, Shot, Trigger


@dataclass(frozen=True)
class Observation:
    """One frame, cropped, with what the trigger made of it: the shot it completes, and the id of the part in view.

    `full_size` (width, height) is (0, 0) for a faulty frame. Pictures are cut-outs of the camera's frames: copy what is kept long.
    """

    frame: Frame
    full_size: tuple[int, int]
    present_id: int | None
    shot: Shot | None


def build_trigger(settings: CameraSettings) -> Trigger:
    """The trigger of the camera's settings."""
    return TRIGGERS[settings.trigger.kind](settings.trigger, settings.roi)


def observe(source: Source, settings: CameraSettings, trigger: Trigger) -> Generator[Observation, None, None]:
    """Every frame of an open source: masked, checked, cropped and shown to the trigger, in this order.

    Raises:
        CameraError: C-ROI, C-MASK where the settings do not fit the frames; what the source raises.
    """
    hide, crop = PrivacyMask(settings.mask), Cropper(settings.roi, copies=False)
    check = FrameChecks(settings.checks, hide, live=is_live(settings.source))
    for given in source:
        full = check(hide(_shaped(given)))
        frame = crop(full)
        shot = trigger.update(frame)
        yield Observation(frame, (full.image.shape[1], full.image.shape[0]), trigger.present_id, shot)


def _shaped(frame: Frame) -> Frame:
    """A driver that gives another kind of picture gives bad frames, not an error in whoever looks at them first."""
    image = frame.image
    if frame.fault is not None or (image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and image.size):
        return frame
    return replace(
        frame,
        image=np.zeros((0, 0, 3), np.uint8),
        fault=Fault("F-SHAPE", f"the camera gives {image.dtype} {image.shape}, expected uint8 (H, W, 3) BGR"),
    )
