"""A network camera by RTSP or MJPEG over HTTP; `source: rtsp://user:password@host/path`."""

from __future__ import annotations

import os

import cv2

from devices.errors import CameraError
from devices.settings import CameraSettings
from devices.sources.live import LiveCapture

OPEN_TIMEOUT_MS, READ_TIMEOUT_MS = 5000, 5000
FFMPEG_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"


class RtspSource(LiveCapture):
    """Frames of a stream, over TCP: OpenCV's default transport has changed between versions, and UDP drops packets."""

    kind = "rtsp"

    def __init__(self, url: str, settings: CameraSettings) -> None:
        os.environ.setdefault(FFMPEG_OPTIONS, "rtsp_transport;tcp")
        # The time-outs work only when given at opening, to the FFmpeg backend.
        capture = cv2.VideoCapture(
            url,
            cv2.CAP_FFMPEG,
            [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPEN_TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, READ_TIMEOUT_MS],
        )
        if not capture.isOpened():
            raise CameraError(
                "C-OPEN",
                f"{mask(url)} cannot be opened within {OPEN_TIMEOUT_MS / 1000:g} s (address, account, or camera off?)",
            )
        super().__init__(capture, f"{mask(url)} gives no more frames")


def mask(url: str) -> str:
    """The address without its password, for messages."""
    scheme, separator, rest = url.partition("://")
    if not separator or "@" not in rest:
        return url
    account, _, host = rest.rpartition("@")
    return f"{scheme}://{account.partition(':')[0]}:***@{host}"
