"""Asking a running line for kept results once more: what the MES (`cmd/replay`) and the admin socket have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edge_dkm.errors import UsageError
from edge_dkm.mqtt.delivery import Replay

if TYPE_CHECKING:
    from edge_dkm.line import Line


class ReplayError(UsageError):
    """A replay that cannot be; `code` (CMD-...) is that of the answer to a command."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def start_replay(line: Line, wanted: Replay) -> Replay:
    """Queues a replay; returns it as it is queued: of the line's own epoch up to the newest result at most.

    Raises:
        ReplayError: CMD-CAMERA, CMD-RANGE or CMD-BUSY.
    """
    camera = wanted.camera
    if camera not in line.captures:
        raise ReplayError("CMD-CAMERA", f"there is no camera {camera}, expected one of {', '.join(line.captures)}")
    newest = line.outbox.last_cseq().get(camera, 0)
    last = min(wanted.last, newest) if wanted.epoch == line.outbox.epoch else wanted.last
    if wanted.first > last:
        text = f"cseq {wanted.first} to {wanted.last} is empty, the newest of camera {camera} is {newest}"
        raise ReplayError("CMD-RANGE", text)
    queued = replace(wanted, last=last)
    if not line.publisher.replay(replace(queued)):  # its own copy: it moves on as rows go out
        raise ReplayError("CMD-BUSY", "too many replays wait already; ask again later")
    return queued
