"""The command `edge-dkm families`: new kinds of parts among the novel ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from configs.command import add_command, add_overrides, show


def add_families_command(commands: Any) -> None:
    """Adds it to the command line."""
    families = add_command(
        commands, "families", _families, "families among a station's novel parts, proposed as new clusters"
    )
    families.add_argument("line", metavar="LINE.yaml", help="the line file that the station runs")
    add_overrides(families)
    families.add_argument("--camera", metavar="NAME", help="which camera (default: each)")
    families.add_argument("--hours", type=float, metavar="H", help="only frames of the last H hours")
    families.add_argument("--html", type=Path, metavar="FILE", help="write their pictures as one page")


def _families(arguments: argparse.Namespace) -> int:
    from edge_dkm.families.page import families_page
    from edge_dkm.families.proposals import search
    from edge_dkm.frames.append_file import write_atomically
    from edge_dkm.placeholders import read_outline

    settings = read_outline(arguments.line, arguments.overrides).settings
    found = list(search(settings, arguments.camera, arguments.hours))
    lines = [searched.text() for searched in found]
    if arguments.html is not None:
        write_atomically(arguments.html, families_page(settings.station, found).encode())
        lines.append(f"page      {arguments.html}")
    show(arguments.json, [searched.plain() for searched in found], "\n".join(lines))
    return 0
