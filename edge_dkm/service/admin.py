"""The admin socket of a running station, `<state>/admin.sock`: one JSON line in, one JSON line out. `edge-dkm outbox` and `status` speak to it.

Whoever may open the state folder may speak here, nobody else: the socket has mode 0600 in a folder of 0700.

    {"verb": "status", "args": {}}  ->  {"ok": true, "result": {...}}  or  {"ok": false, "error": "...", "exit_code": 1}
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socketserver
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edge_dkm.errors import StorageError
from edge_dkm.service.connections import REQUEST_S, BoundedServer
from edge_dkm.set_aside import set_aside

SOCKET = "admin.sock"
MAX_PATH_BYTES = 107  # of sockaddr_un on Linux, without the closing NUL
MAX_REQUEST_BYTES = 65_536

log = logging.getLogger(__name__)
Handler = Callable[[dict[str, Any]], dict[str, Any]]


@contextlib.contextmanager
def short_address(path: Path) -> Iterator[str]:
    """A name of `path` that fits a socket address: its own, or one by way of an open folder where it is too long.

    Raises:
        OSError: the folder cannot be opened, or this system offers no such way.
    """
    if len(os.fsencode(path)) <= MAX_PATH_BYTES:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class AdminServer:
    """Answers by `handlers`, verb by verb, from its construction until `close`. A handler's EdgeError goes to the client with its exit code.

    The holder of the state folder's lock owns the socket: what a killed process left there is replaced.

    Raises:
        StorageError: the socket cannot be made.
    """

    def __init__(self, path: Path, handlers: Mapping[str, Handler]) -> None:
        self.path = path
        try:
            _make_room(path)
            with short_address(path) as address:
                self._server = _Server(address, handlers)
            self._inode = path.stat().st_ino
        except OSError as error:
            raise StorageError(
                f"admin socket {path} cannot be made: {error.strerror or error}; give `state` another folder on a local disk"
            ) from None
        self._server.start("admin")

    def close(self) -> None:
        """Stops listening, removes the socket and closes what is open."""
        self._server.stop()
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()


def _make_room(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISSOCK(mode):
        path.unlink()
    else:
        log.warning("S-CORRUPT %s is no socket, moved to %s", path, set_aside(path))


class _Server(BoundedServer, socketserver.UnixStreamServer):
    def __init__(self, address: str, handlers: Mapping[str, Handler]) -> None:
        self.handlers = handlers
        super().__init__(address, _Conversation)

    def server_bind(self) -> None:
        # Linux gives the file the mode of the unbound socket, so it is private from its first moment.
        os.fchmod(self.socket.fileno(), 0o600)
        super().server_bind()
        Path(str(self.server_address)).chmod(0o600)  # where the above is not so

    def turn_away(self, request: Any) -> None:
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(_line(_refusal("the station is busy with other requests; try again", 1)))


class _Conversation(socketserver.StreamRequestHandler):
    server: _Server
    timeout = REQUEST_S

    def handle(self) -> None:
        line = self.rfile.readline(MAX_REQUEST_BYTES + 1)
        if not line:
            return
        self.server.connections.answering(self.connection)
        self.wfile.write(_line(self._answer(line)))

    def _answer(self, line: bytes) -> dict[str, Any]:
        if len(line) > MAX_REQUEST_BYTES:
            return _refusal(f"the request is longer than {MAX_REQUEST_BYTES} bytes", 2)
        try:
            request = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            return _refusal("the request is not one line of JSON", 2)
        verb, args = (request.get("verb"), request.get("args", {})) if isinstance(request, dict) else (None, None)
        if not isinstance(verb, str) or not isinstance(args, dict):
            return _refusal('expected {"verb": "...", "args": {...}}', 2)
        handler = self.server.handlers.get(verb)
        if handler is None:
            return _refusal(f"verb {verb[:60]!r} is not known here, expected {', '.join(self.server.handlers)}", 2)
        try:
            return {"ok": True, "result": handler(args)}
        except Exception as error:
            code = getattr(error, "exit_code", None)
            if isinstance(code, int):
                return _refusal(str(error), code)
            log.exception("admin request %s failed", verb)
            return _refusal(f"internal error: {type(error).__name__} (the station's log says more)", 1)


def _refusal(text: str, exit_code: int) -> dict[str, Any]:
    return {"ok": False, "error": text, "exit_code": exit_code}


def _line(answer: dict[str, Any]) -> bytes:
    return (json.dumps(answer, ensure_ascii=False, default=str) + "\n").encode("utf-8", "replace")
