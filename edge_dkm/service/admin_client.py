"""Asks a running station through its admin socket, and says the answers for people. `edge-dkm outbox` and `edge-dkm status` call it."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edge_dkm.errors import EdgeError
from edge_dkm.service.admin import SOCKET, short_address

MAX_ANSWER_BYTES = 8_000_000

Plain = Mapping[str, Any]


def ask(state: Path, verb: str, args: Plain | None = None, timeout_s: float = 10.0) -> dict[str, Any]:
    """The station's answer to one request.

    Raises:
        EdgeError: no station runs on that folder, it does not answer in time, or it refuses; with its exit code in the last case.
    """
    path = state / SOCKET
    request = (json.dumps({"verb": verb, "args": dict(args or {})}) + "\n").encode()
    try:
        with short_address(path) as address, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(address)
            with contextlib.suppress(BrokenPipeError):  # a busy station has answered and hung up already
                connection.sendall(request)
            data = _read_line(connection, time.monotonic() + timeout_s)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise EdgeError(
            f"no station runs on state folder {state}, or it is still starting; start it with edge-dkm run LINE.yaml"
        ) from None
    except PermissionError:
        raise EdgeError(
            f"{path} may not be opened; ask as the user that runs the station (sudo -u USER edge-dkm ...)"
        ) from None
    except TimeoutError:
        raise EdgeError(
            f"the station on state folder {state} did not answer {verb} within {timeout_s:g} s; its log says what it is doing"
        ) from None
    except OSError as error:
        raise EdgeError(
            f"{path} cannot be asked: {error.strerror or error}; the station may have ended just now"
        ) from None
    return _result(data, path)


def _read_line(connection: socket.socket, deadline_s: float) -> bytes:
    """Up to the end of the line or of the stream."""
    data = bytearray()
    while not data.endswith(b"\n") and len(data) <= MAX_ANSWER_BYTES:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        connection.settimeout(left_s)
        chunk = connection.recv(65_536)
        if not chunk:
            break
        data += chunk
    return bytes(data)


def _result(data: bytes, path: Path) -> dict[str, Any]:
    try:
        answer = json.loads(data)
        result = answer["result"] if answer["ok"] is True else None
        text, code = str(answer.get("error", "no reason given")), answer.get("exit_code", 1)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        shown = data[:60].decode("utf-8", "replace")
        raise EdgeError(
            f"{path} answered {shown!r}, expected one line of JSON; is the station of the same version, and still running?"
        ) from None
    if isinstance(result, dict):
        return result
    error = EdgeError(text)
    error.exit_code = code if type(code) is int and 0 < code < 128 else 1
    raise error


def outbox_text(status: Plain) -> str:
    """`edge-dkm outbox status`. Keys: rows, bytes, oldest_s, and as far as they are there sent_rows, mode, epoch, is_blocked, dropped, last, quarantined."""
    rows = int(status.get("rows", 0))
    waits = f"{rows} results wait for delivery"
    if rows:
        waits += f" ({_size(status.get('bytes', 0))}), the oldest for {_duration(status.get('oldest_s', 0))}"
    lines = [("outbox", waits if rows else "everything delivered")]
    if status.get("is_blocked"):
        lines.append(("blocked", "the outbox is full and holds the line (delivery.limit: block)"))
    if "sent_rows" in status:
        lines.append(("kept", f"{status['sent_rows']} delivered results, for replay"))
    for camera, reasons in sorted(dict(status.get("dropped", {})).items()):
        lines += [
            ("dropped", f"{camera}: {n} by {reason}, declared as gaps") for reason, n in sorted(reasons.items()) if n
        ]
    lines += [("last", f"{camera}: cseq {n}") for camera, n in sorted(dict(status.get("last", {})).items())]
    if "epoch" in status:
        lines.append(("epoch", str(status["epoch"])))
    if "mode" in status:
        lines.append(("mode", str(status["mode"])))
    if status.get("quarantined"):
        lines.append(("damaged", f"an earlier outbox lies in {status['quarantined']}"))
    return _table(lines)


def replay_text(done: Plain) -> str:
    """`edge-dkm outbox replay`. Keys: camera, from, to, sent (results sent again), missing (cseq that are no longer kept: declared as gaps)."""
    wanted = f"{done.get('camera', '?')}: cseq {done.get('from', '?')} to {done.get('to', '?')}"
    lines = [("replay", f"{wanted}, {done.get('sent', 0)} results go out again, marked historical")]
    if done.get("missing"):
        lines.append(("missing", f"{done['missing']} are no longer kept; a gap record says which"))
    return _table(lines)


def purge_text(done: Plain) -> str:
    """`edge-dkm outbox purge`. Keys: rows (deleted), left (not yet delivered, kept)."""
    text = f"{done.get('rows', 0)} delivered results deleted; they cannot be replayed any more"
    lines = [("purge", text)]
    if done.get("left"):
        lines.append(("left", f"{done['left']} results wait for delivery and stay"))
    return _table(lines)


def status_text(status: Plain) -> str:
    """`edge-dkm status`.

    Takes what is there of: station, state {state, code, detail}, uptime_s, ready, why, broker, alarms, cameras, stages, restarts, counters,
    outbox (as `outbox_text`), disk_free_mb, rss_mb, clock_synced.
    """
    state = dict(status.get("state", {}))
    reason = ": ".join(str(state[key]) for key in ("code", "detail") if state.get(key))
    up = f", up {_duration(status['uptime_s'])}" if "uptime_s" in status else ""
    lines = [
        (
            "station",
            f"{status.get('station', '?')} {state.get('state', 'running')}{f' ({reason})' if reason else ''}{up}",
        )
    ]
    if status.get("ready") is False:
        lines.append(("ready", f"no: {status.get('why') or 'see above'}"))
    if status.get("broker"):
        lines.append(("broker", str(status["broker"])))
    lines += [("alarm", _alarm_text(alarm)) for alarm in status.get("alarms", [])]
    lines += [("camera", text) for text in _camera_lines(status)]
    lines += [("stage", text) for text in _stage_lines(status)]
    outbox = outbox_text(dict(status["outbox"])).splitlines() if "outbox" in status else []
    machine = [
        f"{status[key]} MB {text}"
        for key, text in (("disk_free_mb", "disk free"), ("rss_mb", "memory"))
        if key in status
    ]
    if status.get("clock_synced") is False:
        machine.append("the clock is not synchronised")
    return "\n".join([_table(lines), *outbox, *([_table([("machine", ", ".join(machine))])] if machine else [])])


def _alarm_text(alarm: Plain) -> str:
    """The detail begins with the code of the cause, which may be the alarm's own."""
    code, detail = str(alarm.get("code", "?")), str(alarm.get("detail") or "")
    return detail if detail.startswith(f"{code} ") else f"{code} {detail}".strip()


def _camera_lines(status: Plain) -> Iterable[str]:
    counters = dict(status.get("counters", {}))
    for name, camera in sorted(dict(status.get("cameras", {})).items()):
        text = f"{name}: {camera.get('state', '?')}"
        if camera.get("code"):
            text += f" {camera['code']}"
        if "fps" in camera:
            text += f", {camera['fps']:.1f} fps"
        tally = dict(counters.get(name, {}))
        if tally:
            dropped = sum(dict(tally.get("dropped", {})).values())
            text += f", {tally.get('results', 0)} results, {tally.get('bad', 0)} bad frames, {dropped} skipped"
        yield text


def _stage_lines(status: Plain) -> Iterable[str]:
    """Those that need a word: stuck, degraded, or restarted at some time."""
    restarts = dict(status.get("restarts", {}))
    stages = dict(status.get("stages", {}))
    for name, stage in sorted(stages.items()):
        if stage.get("state") in {"stuck", "degraded"} or restarts.get(name):
            again = f", restarted {restarts[name]} times so far" if restarts.get(name) else ""
            yield f"{name}: {stage.get('state', '?')}, last progress {_duration(stage.get('age_s', 0))} ago{again}"
    for name in sorted(set(restarts) - set(stages)):
        if restarts[name]:
            yield f"{name}: restarted {restarts[name]} times so far"


def _table(lines: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<9} {text}" for name, text in lines)


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.1f} kB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"
