"""Why a network camera cannot be opened: FFmpeg only says that it cannot, so the address is asked once more, by hand."""

from __future__ import annotations

import base64
import http.client
import socket
import ssl
from urllib.parse import unquote, urlsplit

from devices.errors import CameraError

DEFAULT_PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}
PATIENCE_S = 2.0
FORBIDDEN = (401, 403)


def why_refused(url: str, shown: str) -> CameraError:
    """C-REFUSED, C-OPEN-TIMEOUT, C-AUTH (http only) or C-OPEN; `shown` is the address without its password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or DEFAULT_PORTS.get(parts.scheme, 0)
    except ValueError:  # its text may hold a piece of the password
        return CameraError("C-SPEC", f"{shown} is no address; write / ? # in a password as %2F %3F %23")
    if "@" in url.partition("://")[2] and "@" not in parts.netloc:
        return CameraError("C-SPEC", f"{shown} is no address; write / ? # in a password as %2F %3F %23")
    place = f"{host}:{port}"
    try:
        if parts.scheme in {"http", "https"}:
            status = _status(url, host, port)
            if status in FORBIDDEN:
                return CameraError("C-AUTH", f"{shown} answers {status}: account or password are wrong or missing")
            return CameraError("C-OPEN", f"{shown} answers {status}, which is no stream that can be read")
        socket.create_connection((host, port), PATIENCE_S).close()
    except ConnectionRefusedError:
        return CameraError("C-REFUSED", f"{shown}: {place} refuses connections (camera starting, or another port?)")
    except TimeoutError:
        return CameraError("C-OPEN-TIMEOUT", f"{shown}: {place} does not answer within {PATIENCE_S:g} s")
    except (OSError, http.client.HTTPException) as error:
        return CameraError("C-OPEN", f"{shown}: {place}: {error or type(error).__name__}")
    return CameraError("C-OPEN", f"{shown} cannot be opened (path, account, or no stream?)")


def _status(url: str, host: str, port: int) -> int:
    """The status line alone; the stream behind it is not read. Certificates are FFmpeg's business."""
    parts = urlsplit(url)
    headers = {}
    if parts.username is not None:
        account = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(account.encode()).decode()}"
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(host, port, timeout=PATIENCE_S, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    try:
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()
