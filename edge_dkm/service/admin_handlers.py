"""What the admin socket of a running line answers: status, the outbox's status, replay and purge, and the codebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_dkm.commands.replays import start_replay
from edge_dkm.errors import UsageError
from edge_dkm.mqtt.delivery import Replay

if TYPE_CHECKING:
    from edge_dkm.line import Line
    from edge_dkm.service.admin import Handler


def admin_handlers(line: Line) -> dict[str, Handler]:
    """By verb."""
    return {
        "status": lambda _: {**line.status(), "outbox": outbox_status(line)},
        "outbox_status": lambda _: outbox_status(line),
        "replay": lambda args: _replay(line, args),
        "codebooks": lambda _: line.codebooks.plain(),
        "codebook": lambda args: _switch(line, args),
        "purge": lambda _: {"rows": line.outbox.purge(), "left": line.outbox.status().rows},
    }


def outbox_status(line: Line) -> dict[str, Any]:
    """For `edge-dkm outbox status`."""
    status = line.outbox.status()
    return {
        "rows": status.rows,
        "bytes": status.bytes,
        "oldest_s": round(status.oldest_s, 1),
        "sent_rows": status.sent_rows,
        "dropped": status.dropped,
        "is_blocked": line.outbox.is_blocked,
        "mode": line.settings.delivery.mode,
        "epoch": line.outbox.epoch,
        "last": line.outbox.last_cseq(),
        "quarantined": str(line.outbox.quarantined) if line.outbox.quarantined else None,
    }


def _switch(line: Line, args: dict[str, Any]) -> dict[str, Any]:
    """From the next frame on; `info` says so."""
    how = args.get("how")
    if how not in {"recentre", "rollback"}:
        raise UsageError(f"how is {how!r}, expected recentre or rollback")
    line.codebooks.switch(str(args.get("camera")), str(args.get("codebook")), how)
    line.announcer.info()
    line.attention.set()
    return line.codebooks.plain()[str(args.get("camera"))]


def _replay(line: Line, args: dict[str, Any]) -> dict[str, Any]:
    """Without a camera of the first one, without a range of all."""
    camera = str(args.get("camera") or next(iter(line.captures)))
    first, last = _cseq(args, "from", 1), _cseq(args, "to", line.outbox.last_cseq().get(camera, 0))
    queued = start_replay(line, Replay(camera, line.outbox.epoch, first, last))
    held = line.outbox.count_kept(camera, queued.first, queued.last)
    missing = queued.last - queued.first + 1 - held
    return {"camera": camera, "from": queued.first, "to": queued.last, "sent": held, "missing": missing}


def _cseq(args: dict[str, Any], key: str, default: int) -> int:
    value = args.get(key)
    if value is None:
        return default
    if type(value) is not int or value < 1:
        raise UsageError(f"{key} is {value!r}, expected a cseq: a whole number of at least 1")
    return value
