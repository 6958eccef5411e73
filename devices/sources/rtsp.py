"""A network camera by RTSP or MJPEG over HTTP; `source: rtsp://user:password@host/path`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import cv2
import numpy as np

from devices.errors import CameraError
from devices.frame import Frame
from devices.settings import CameraSettings

OPEN_TIMEOUT_MS, READ_TIMEOUT_MS = 5000, 5000
FFMPEG_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"


class RtspSource:
    """Frames of a stream, over TCP: OpenCV's default transport has changed between versions, and UDP drops packets."""

    kind = "rtsp"
    live = True

    def __init__(self, url: str, settings: CameraSettings) -> None:
        os.environ.setdefault(FFMPEG_OPTIONS, "rtsp_transport;tcp")
        self._url, self._closed = url, False
        # The time-outs work only when given at opening, to the FFmpeg backend.
        self._capture = cv2.VideoCapture(
            url,
            cv2.CAP_FFMPEG,
            [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPEN_TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, READ_TIMEOUT_MS],
        )
        if not self._capture.isOpened():
            raise CameraError(
                "C-OPEN",
                f"{mask(url)} cannot be opened within {OPEN_TIMEOUT_MS / 1000:g} s (address, account, or camera off?)",
            )

    def __iter__(self) -> Iterator[Frame]:
        index = 0
        while not self._closed:
            ok, image = self._capture.read()
            if not ok:
                if not self._closed:
                    raise CameraError("C-LOST", f"{mask(self._url)} gives no more frames")
                break
            yield Frame.now(np.asarray(image, np.uint8), index)
            index += 1
        self._capture.release()

    def close(self) -> None:
        self._closed = True


def mask(url: str) -> str:
    """The address without its password, for messages."""
    scheme, separator, rest = url.partition("://")
    if not separator or "@" not in rest:
        return url
    account, _, host = rest.rpartition("@")
    return f"{scheme}://{account.partition(':')[0]}:***@{host}"
