"""A USB camera; `source: usb:0`, or `usb:/dev/video0`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import cv2

from devices.errors import CameraError
from devices.settings import CameraSettings
from devices.sources.live import LiveCapture


@dataclass(frozen=True)
class VideoDevice:
    """A camera that gives frames: its number, the driver's name for it, its frame size (width, height)."""

    address: str
    name: str
    size: tuple[int, int]


def list_devices() -> list[VideoDevice]:
    """The video devices of this machine that deliver a frame size (many cameras show a second, empty device)."""
    found = []
    for path in sorted(Path("/dev").glob("video[0-9]*"), key=lambda p: int(p.name[5:])):
        capture = cv2.VideoCapture(str(path), cv2.CAP_V4L2)
        size = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        capture.release()
        if all(size):
            label = Path(f"/sys/class/video4linux/{path.name}/name")
            found.append(VideoDevice(path.name[5:], label.read_text().strip() if label.exists() else path.name, size))
    return found


class UsbSource(LiveCapture):
    """Frames as the driver gives them. `read` may block for as long as the driver does (V4L2: 10 s)."""

    kind = "usb"

    def __init__(self, device: str, settings: CameraSettings) -> None:
        name: int | str = int(device) if device.isdigit() else device
        path = Path(f"/dev/video{name}" if isinstance(name, int) else name)
        if sys.platform.startswith("linux") and not path.exists():
            there = ", ".join(sorted(str(p) for p in Path("/dev").glob("video*"))) or "none"
            raise CameraError("C-NODEV", f"usb:{device} is not there, {path} does not exist (video devices: {there})")
        backend = cv2.CAP_V4L2 if sys.platform.startswith("linux") else cv2.CAP_ANY
        capture = cv2.VideoCapture(name, backend)
        if not capture.isOpened():
            raise CameraError(
                "C-OPEN",
                f"usb:{device} cannot be opened (in use by another program, or no permission: is the user in the group video?)",
            )
        if settings.fps:
            capture.set(cv2.CAP_PROP_FPS, settings.fps)
        super().__init__(capture, f"usb:{device} gives no more frames (unplugged?)")
