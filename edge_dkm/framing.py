"""Whether a camera shows the model what it was trained on: the ROI's size and place, the frame's size. `check` and `run` ask."""

from __future__ import annotations

from devices.settings import CameraSettings
from edge_dkm.contract import InputSpec


def roi_problem(name: str, camera: CameraSettings, spec: InputSpec) -> str | None:
    """What does not fit, from the settings alone; None where nothing is known to differ."""
    trained = (spec.roi[2], spec.roi[3]) if spec.roi else None
    if camera.roi is not None:
        size = camera.roi[2], camera.roi[3]
        if spec.w is not None and spec.h is not None and size != (spec.w, spec.h):
            return f"cameras.{name}.roi is {_box(camera.roi)}, but the model takes frames of exactly {spec.w}x{spec.h}"
        if camera.framing == "same" and spec.roi is not None and camera.roi != spec.roi:
            return f"cameras.{name}.roi is {_box(camera.roi)}, but the model was trained on roi {_box(spec.roi)}; {_remedy(name)}"
    elif camera.framing == "same" and trained is not None and spec.roi is not None:
        return f"cameras.{name} has no roi, but the model was trained on roi {_box(spec.roi)}; {_remedy(name)}"
    return None


def frame_problem(name: str, camera: CameraSettings, spec: InputSpec, frame: tuple[int, int]) -> str | None:
    """What does not fit, once the camera has given a frame of this (width, height)."""
    seen = (camera.roi[2], camera.roi[3]) if camera.roi else frame
    if spec.w is not None and spec.h is not None and seen != (spec.w, spec.h):
        return f"cameras.{name} gives {seen[0]}x{seen[1]}, but the model takes exactly {spec.w}x{spec.h}"
    if camera.framing == "any" or spec.frame is None:
        return None
    if spec.roi is not None and frame != spec.frame:
        return f"cameras.{name} gives frames of {frame[0]}x{frame[1]}, but the model was trained on {spec.frame[0]}x{spec.frame[1]}; {_remedy(name)}"
    if spec.roi is None and seen != spec.frame:
        return f"cameras.{name} shows the model {seen[0]}x{seen[1]}, but it was trained on images of {spec.frame[0]}x{spec.frame[1]}; {_remedy(name)}"
    return None


def _remedy(name: str) -> str:
    return f"record and train with this framing, or set cameras.{name}.framing: any"


def _box(box: tuple[int, int, int, int]) -> str:
    return ",".join(map(str, box))
