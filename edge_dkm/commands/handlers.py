"""What the MES may ask of a running line, besides what `live_settings` keeps: trigger and replay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_dkm.commands.commands import Handler, Outcome, refused
from edge_dkm.commands.decoder import Command, ReplayArgs, TriggerArgs
from edge_dkm.commands.replays import ReplayError, start_replay
from edge_dkm.message import Part
from edge_dkm.mqtt.delivery import Replay

if TYPE_CHECKING:
    from edge_dkm.line import Line


def line_handlers(line: Line) -> dict[str, Handler]:
    """By verb; those of the live settings among them."""
    return {
        **line.live.handlers,
        "trigger": lambda command: _trigger(line, command),
        "replay": lambda command: _replay(line, command),
    }


def _trigger(line: Line, command: Command) -> Outcome:
    """The part's intent is on disk before the answer goes out."""
    args, name = command.arguments(TriggerArgs), command.camera or ""
    capture = line.captures.get(name)
    if capture is None:
        return refused("CMD-CAMERA", f"there is no camera {name}, expected one of {', '.join(line.captures)}")
    if capture.settings.trigger.kind != "mqtt":
        kind = capture.settings.trigger.kind
        return refused("CMD-TRIGGER", f"camera {name} has the trigger {kind}, expected mqtt in the line file")
    if line.pipeline.is_paused:
        return refused("CMD-PAUSED", "the line is paused; resume it first")
    part = Part(id=args.part.id, product=args.part.product) if args.part else None
    token = line.pipeline.promise(name, part)
    if token is None:
        return refused("CMD-STORE", "the part could not be written to the outbox")
    capture.fire(token)
    return Outcome(True, None, f"result_id {token}")


def _replay(line: Line, command: Command) -> Outcome:
    args = command.arguments(ReplayArgs)
    try:
        queued = start_replay(line, Replay(args.camera, args.epoch, args.from_, args.to))
    except ReplayError as error:
        return refused(error.code, str(error))
    return Outcome(True, None, f"cseq {queued.first} to {queued.last} go out again")
