"""Cameras for tests: a film, and a network camera on localhost."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest


def ramp() -> np.ndarray:
    """Some contrast: a picture without any is a faulty frame. Adds 0 to 15 levels."""
    return np.broadcast_to((np.arange(64) // 4).astype(np.uint8)[None, :, None], (48, 64, 3))


def film(path: Path, frames: int = 12, fps: float = 50) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (64, 48))
    for n in range(frames):
        writer.write(np.full((48, 64, 3), 10 + 15 * n, np.uint8) + ramp())
    writer.release()
    return path


class _Mjpeg(http.server.BaseHTTPRequestHandler):
    """An MJPEG camera: `frames` pictures, then the connection ends."""

    def __init__(self, frames: int, *args: object) -> None:
        self._frames = frames
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for n in range(self._frames):
            data = cv2.imencode(".jpg", np.full((48, 64, 3), 20 + 10 * n, np.uint8) + ramp())[1].tobytes()
            self.wfile.write(
                b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data) + data + b"\r\n"
            )

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def mjpeg_camera() -> Iterator[str]:
    """The address of a network camera that gives ten frames per connection."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Mjpeg, 10))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/stream.mjpg"
    server.shutdown()
    server.server_close()
