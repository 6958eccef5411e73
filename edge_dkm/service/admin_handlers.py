"""What the admin socket of a running line answers: status, and the outbox's status, replay and purge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_dkm.errors import UsageError
from edge_dkm.line import outbox_status
from edge_dkm.mqtt.delivery import Replay

if TYPE_CHECKING:
    from edge_dkm.line import Line
    from edge_dkm.service.admin import Handler


def admin_handlers(line: Line) -> dict[str, Handler]:
    """By verb."""
    return {
        "status": lambda _: {**line.status(), "outbox": outbox_status(line)},
        "outbox_status": lambda _: dict(outbox_status(line)),
        "replay": lambda args: _replay(line, args),
        "purge": lambda _: {"rows": line.outbox.purge(), "left": line.outbox.status().rows},
    }


def _replay(line: Line, args: dict[str, Any]) -> dict[str, Any]:
    camera = str(args.get("camera") or next(iter(line.captures)))
    if camera not in line.captures:
        raise UsageError(f"there is no camera {camera}, expected one of {', '.join(line.captures)}")
    newest = line.outbox.last_cseq().get(camera, 0)
    first, last = int(args.get("from") or 1), min(int(args.get("to") or newest), newest)
    if first > last:
        raise UsageError(f"cseq {first} to {last} is empty, the newest of camera {camera} is {newest}")
    held = line.outbox.count_kept(camera, first, last)
    if not line.publisher.replay(Replay(camera, line.outbox.epoch, first, last)):
        raise UsageError("too many replays wait already; ask again later")
    return {"camera": camera, "from": first, "to": last, "sent": held, "missing": last - first + 1 - held}
