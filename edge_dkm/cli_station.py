"""The commands of `edge-dkm` that look after a running station: status, outbox, service."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from configs.command import add_command, add_overrides, show

OUTBOX_VERBS = ("status", "replay", "purge")


def add_station_commands(commands: Any) -> None:
    """Adds them to the command line."""
    status = add_command(commands, "status", _status, "how a running station is doing; works without a broker")
    _add_line(status)

    outbox = add_command(commands, "outbox", _outbox, "look at, send again or empty the outbox of a running station")
    outbox.add_argument(
        "verb",
        choices=OUTBOX_VERBS,
        help="status; replay: send kept results again, marked historical; purge: delete what was delivered",
    )
    _add_line(outbox)
    outbox.add_argument("--camera", metavar="NAME", help="replay: which camera (default: the first)")
    outbox.add_argument("--from", dest="first", type=int, metavar="CSEQ", help="replay: from here (default: 1)")
    outbox.add_argument("--to", dest="last", type=int, metavar="CSEQ", help="replay: up to here (default: the newest)")

    service = add_command(commands, "service", _service, "run a line as a systemd service")
    service.add_argument("verb", choices=("install",), help="install: write a hardened unit with a watchdog")
    service.add_argument("line", metavar="LINE.yaml")
    service.add_argument("--user", default="edge-dkm", metavar="NAME", help="who runs it (default: edge-dkm)")
    service.add_argument("--name", metavar="NAME", help="name of the unit (default: edge-dkm-STATION)")
    service.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help="write below this folder")
    service.add_argument("--print", dest="print_only", action="store_true", help="print the unit, write nothing")
    service.add_argument("--force", action="store_true", help="replace a unit that differs")


def _add_line(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("line", metavar="LINE.yaml", help="the line file that the station runs")
    add_overrides(parser)


def _state(arguments: argparse.Namespace) -> Path:
    """The station's state folder; the secrets that its line file names need not be known to who asks."""
    from edge_dkm.placeholders import read_outline

    return read_outline(arguments.line, arguments.overrides).settings.state


def _status(arguments: argparse.Namespace) -> int:
    from edge_dkm.service.admin_client import ask, status_text

    answer = ask(_state(arguments), "status")
    show(arguments.json, answer, status_text(answer))
    return 0


def _outbox(arguments: argparse.Namespace) -> int:
    from edge_dkm.service.admin_client import ask, outbox_text, purge_text, replay_text

    verb, text = {
        "status": ("outbox_status", outbox_text),
        "replay": ("replay", replay_text),
        "purge": ("purge", purge_text),
    }[arguments.verb]
    wanted = {"camera": arguments.camera, "from": arguments.first, "to": arguments.last}
    answer = ask(_state(arguments), verb, wanted if verb == "replay" else {})
    show(arguments.json, answer, text(answer))
    return 0


def _service(arguments: argparse.Namespace) -> int:
    from edge_dkm.service.unit import install, read_options, render_unit

    options = read_options(arguments.line, arguments.user, arguments.name)
    if arguments.print_only:
        print(render_unit(options), end="")
        return 0
    done = install(options, arguments.root, arguments.force)
    plain = {"path": str(done.path), "is_written": done.is_written, "next_steps": list(done.next_steps)}
    lines = [f"{'written' if done.is_written else 'unchanged'}   {done.path}", "next:", *done.next_steps]
    show(arguments.json, plain, "\n".join(lines))
    return 0
