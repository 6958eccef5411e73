"""The commands of `edge-dkm` that look after a running station: status, outbox, recentre, service."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.command import add_command, add_overrides, show

OUTBOX_VERBS = ("status", "replay", "purge")
NICE = 10  # of recentre: the line's own processes come first


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

    recentre = add_command(
        commands, "recentre", _recentre, "a new codebook from the station's recent parts; the model stays"
    )
    _add_line(recentre)
    recentre.add_argument("--camera", metavar="NAME", help="which camera (default: each)")
    recentre.add_argument("--hours", type=float, metavar="H", help="only parts of the last H hours")
    recentre.add_argument("--target-frr", type=float, metavar="RATE", help="the rate to keep (default: the model's)")
    what = recentre.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="compute and check it, write nothing")
    what.add_argument(
        "--rollback",
        nargs="?",
        const="",
        metavar="CODEBOOK",
        help="go back to base, to a codebook by its 12 digits, or (without a name) to what ran before",
    )
    what.add_argument("--list", action="store_true", help="which codebooks there are, and which are in force")

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


def _recentre(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: the line needs the other cores
    os.nice(NICE)
    from edge_dkm.placeholders import read_outline
    from edge_dkm.recentring.station import Station, Wish, text

    with Station(read_outline(arguments.line, arguments.overrides).settings) as station:
        if arguments.list:
            listed = list(station.listed(arguments.camera))
            show(arguments.json, listed, "\n".join(_codebook_lines(listed)))
            return 0
        if arguments.rollback is not None:
            done = list(station.roll_back(arguments.camera, arguments.rollback or None))
        else:
            wish = Wish(arguments.camera, arguments.hours, arguments.target_frr, arguments.dry_run)
            done = list(station.recentre(wish))
    show(arguments.json, [one.plain() for one in done], "\n".join(text(one) for one in done))
    return 0 if all(one.refusal is None for one in done) else 1


def _codebook_lines(listed: list[dict[str, Any]]) -> Iterator[str]:
    for row in listed:
        chain = f", before: {', '.join(row['chain'])}" if row["chain"] else ""
        yield f"{row['camera']:<9} {row['codebook']} in force{chain}"
        if row["problem"]:
            yield f"{'':<9} {row['problem']['code']} {row['problem']['detail']}"
        for book in row["codebooks"]:
            yield (
                f"{'':<9} {book['codebook']}  {book.get('created', '?')}  from {book.get('parent', '?')}, "
                f"{book.get('n', '?')} parts of {book.get('groups', '?')} groups, false rejects {book.get('promised_frr', '?')}"
            )


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
