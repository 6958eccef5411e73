"""A network camera (MJPEG over HTTP) that misbehaves on demand: every mode can be set while clients are connected.

It runs in the test's process: one thread that accepts, one per connection. `mode = "ok"` ends every hang at once.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import Literal

import cv2
import numpy as np

Mode = Literal[
    "ok",
    "refuse",  # nothing listens on the port
    "hang_on_open",  # accepts, never answers
    "hang_mid_frame",  # half a picture, then silence
    "trickle",  # one byte of a picture every 50 ms
    "reset",  # RST in the middle of a picture
    "eof",  # orderly end of the connection
    "resized",  # pictures of another size
    "garbage",  # bytes that are no stream
    "truncated",  # every picture lacks its second half
    "damaged",  # every picture's scan is damaged in the middle
    "frozen",  # the same picture again and again
    "black",
    "unauthorized",  # 401
]
BOUNDARY = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"
WIDTH_PX, HEIGHT_PX, PICTURES = 160, 120, 16


def _pictures(width: int, height: int) -> list[bytes]:
    """JPEG pictures of a bright square that wanders over noise."""
    rng = np.random.default_rng(width)
    made = []
    for n in range(PICTURES):
        image = rng.normal(90, 25, (height, width, 3)).clip(0, 255).astype(np.uint8)
        left = n * width // (2 * PICTURES)
        image[height // 4 : height // 2, left : left + width // 4] = 220
        made.append(cv2.imencode(".jpg", image)[1].tobytes())
    return made


def damage_scan(picture: bytes) -> bytes:
    """The picture with zeros from the middle of its scan on, and its end mark in place: decoders take it without complaint."""
    middle = len(picture) // 2
    return picture[:middle] + b"\xff\xd9"


class MjpegCamera:
    """Use as a context; `url` is its address.

    `connections` counts the clients so far, `frames` the pictures sent whole, `hanging` the clients left waiting now.
    """

    def __init__(self, fps: float = 25.0, account: str = "") -> None:
        self.fps, self.connections, self.frames, self.hanging = fps, 0, 0, 0
        self._good, self._resized = _pictures(WIDTH_PX, HEIGHT_PX), _pictures(2 * WIDTH_PX, 2 * HEIGHT_PX)
        self._black = cv2.imencode(".jpg", np.zeros((HEIGHT_PX, WIDTH_PX, 3), np.uint8))[1].tobytes()
        self._mode: Mode = "ok"
        self._changed = threading.Condition()
        self._closed = False
        self._clients: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = self._listen(0)
        self.port: int = self._listener.getsockname()[1] if self._listener else 0
        self.url = f"http://{account}127.0.0.1:{self.port}/stream.mjpg"
        self._acceptor = threading.Thread(target=self._accept, name="mjpeg camera", daemon=True)
        self._acceptor.start()

    @property
    def mode(self) -> Mode:
        """What it does now; setting it takes effect at the next picture."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        with self._changed:
            self._mode = mode
            if mode in {"refuse", "unauthorized"}:
                self._drop_clients()
            if mode == "refuse":
                self._stop_listening()
            elif self._listener is None:
                self._listener = self._listen(self.port)
            self._changed.notify_all()

    def _listen(self, port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(16)
        return listener

    def _stop_listening(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
            self._listener.close()
            self._listener = None

    def _drop_clients(self) -> None:
        for client in list(self._clients):
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._listener is not None)
                if self._closed:
                    return
                listener = self._listener
            try:
                client = listener.accept()[0] if listener is not None else None
            except OSError:
                continue
            if client is None:
                continue
            self.connections += 1
            self._clients.add(client)
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            thread = threading.Thread(target=self._serve, args=(client,), name="mjpeg client", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            self._answer(client)
        except OSError:
            pass
        finally:
            self._clients.discard(client)
            client.close()

    def _answer(self, client: socket.socket) -> None:
        if not client.recv(65536):
            return
        mode = self._mode
        if mode == "hang_on_open":
            self._hang(mode)
        elif mode == "unauthorized":
            client.sendall(
                b'HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm="camera"\r\nContent-Length: 0\r\n\r\n'
            )
        elif mode == "garbage":
            client.sendall(np.random.default_rng(0).bytes(200_000))
        else:
            client.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n")
            self._stream(client)

    def _stream(self, client: socket.socket) -> None:
        number = 0
        due_s = time.monotonic()
        while not self._closed:
            mode = self._mode
            picture = self._picture(mode, number)
            message = BOUNDARY % len(picture) + picture + b"\r\n"
            half = len(message) // 2
            if mode == "eof":
                return
            if mode == "garbage":
                client.sendall(np.random.default_rng(number).bytes(200_000))
                return
            if mode == "reset":
                client.sendall(message[:half])
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            if mode in {"hang_mid_frame", "hang_on_open"}:
                client.sendall(message[:half])
                self._hang(mode)
                client.sendall(message[half:])
            elif mode == "trickle":
                self._trickle(client, message)
            else:
                client.sendall(message)
                self.frames += 1
            number += 1
            due_s = max(due_s + 1 / self.fps, time.monotonic() - 1)
            self._pause(due_s - time.monotonic(), mode)

    def _picture(self, mode: Mode, number: int) -> bytes:
        good = self._good[number % PICTURES]
        if mode == "black":
            return self._black
        if mode == "frozen":
            return self._good[0]
        if mode == "resized":
            return self._resized[number % PICTURES]
        if mode == "truncated":
            return good[: len(good) // 2]
        return damage_scan(good) if mode == "damaged" else good

    def _trickle(self, client: socket.socket, message: bytes) -> None:
        for n in range(len(message)):
            if self._mode != "trickle" or self._closed:
                client.sendall(message[n:])
                return
            client.sendall(message[n : n + 1])
            self._pause(0.05, "trickle")

    def _hang(self, mode: Mode) -> None:
        with self._changed:
            self.hanging += 1
            self._changed.wait_for(lambda: self._closed or self._mode != mode)
            self.hanging -= 1

    def _pause(self, seconds: float, mode: Mode) -> None:
        """Waits, but not longer than the mode lasts."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._mode != mode, max(0.0, seconds))

    def close(self) -> None:
        """Ends all connections and threads."""
        with self._changed:
            self._closed = True
            self._stop_listening()
            self._drop_clients()
            self._changed.notify_all()
        self._acceptor.join(5)
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> MjpegCamera:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
