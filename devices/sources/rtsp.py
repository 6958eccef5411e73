"""A network camera by RTSP or MJPEG over HTTP; `source: rtsp://user:password@host/path`."""

from __future__ import annotations

import os
import time

import cv2

from devices.errors import CameraError
from devices.settings import CameraSettings
from devices.sources.live import LiveCapture
from devices.sources.masking import mask
from devices.sources.refusal import why_refused

FFMPEG_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
BEHIND_WATCHDOG = (
    1.5  # the capture's own watchdog comes first; where there is none (`check`, `record`) these end a read
)
MJPEG = cv2.VideoWriter.fourcc(*"MJPG")


class RtspSource(LiveCapture):
    """Frames of a stream, over TCP: OpenCV's default transport has changed between versions, and UDP drops packets.

    MJPEG pictures are decoded here: FFmpeg conceals damage, and OpenCV scales pictures of another size to the first one's.
    """

    kind = "rtsp"

    def __init__(self, url: str, settings: CameraSettings) -> None:
        os.environ.setdefault(FFMPEG_OPTIONS, "rtsp_transport;tcp")
        self.shown, self.check_damage = mask(url), settings.checks.damaged
        started_s = time.monotonic()
        limits_ms = [round(s * 1000 * BEHIND_WATCHDOG) for s in (settings.open_timeout_s, settings.stall_s)]
        # The time-outs work only when given at opening, to the FFmpeg backend.
        capture = cv2.VideoCapture(
            url,
            cv2.CAP_FFMPEG,
            [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limits_ms[0], cv2.CAP_PROP_READ_TIMEOUT_MSEC, limits_ms[1]],
        )
        if not capture.isOpened():
            took_s = time.monotonic() - started_s
            if took_s >= settings.open_timeout_s:
                raise CameraError("C-OPEN-TIMEOUT", f"{self.shown} does not open within {took_s:.1f} s")
            raise why_refused(url, self.shown)
        is_http = url.lower().startswith("http")
        self.has_time = not is_http
        if is_http and int(capture.get(cv2.CAP_PROP_FOURCC)) == MJPEG:
            self.gives_jpeg = capture.set(cv2.CAP_PROP_FORMAT, -1)
        super().__init__(capture, f"{self.shown} gives no more frames")
