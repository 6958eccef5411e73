"""index.csv of a folder of frames: rows in the layout of `edge-dkm record`, read so that a torn or foreign line costs that line alone."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import datetime
from pathlib import Path

INDEX = "index.csv"
NAME = re.compile(r"(?P<camera>[A-Za-z0-9_-]+)-(?P<day>\d{8})T(?P<time>\d{12})Z-(?P<id>[0-9a-f]{32})\.png")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


@dataclass(frozen=True)
class FrameRow:
    """One line. All text, as in the file; the columns of edge_dkm/recorder.py in their order, empty where unknown."""

    file: str
    camera: str
    ts: str
    group: str
    result_id: str
    cluster: str
    novelty_score: str
    verdict: str
    roi: str
    frame: str

    @property
    def taken_s(self) -> float:
        """Seconds since 1970; 0 where `ts` is no time."""
        try:
            return datetime.fromisoformat(self.ts).timestamp()
        except (ValueError, OverflowError):
            return 0.0


COLUMNS = tuple(field.name for field in fields(FrameRow))


class DamagedIndexError(ValueError):
    """A file that is no index."""


def frame_name(camera: str, ts: str, result_id: str) -> str:
    """A file's name from which a lost row can be told again: `top-20261120T234401123456Z-0193....png`."""
    return f"{camera}-{re.sub(r'[-:.]', '', ts)}-{result_id.replace('-', '')}.png"


def row_of_name(name: str) -> FrameRow | None:
    """The row of a frame of which only the file is left; it is a group of its own. None for a name that is none of ours."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    day, time, digits = match["day"], match["time"], match["id"]
    ts = f"{day[:4]}-{day[4:6]}-{day[6:]}T{time[:2]}:{time[2:4]}:{time[4:6]}.{time[6:]}Z"
    result_id = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    return FrameRow(name, match["camera"], ts, result_id, result_id, "", "", "", "", "")


def index_bytes(rows: Iterable[FrameRow], *, with_header: bool) -> bytes:
    """Lines of the file. What would break a line is made a space: a part's number may be anything a MES writes."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    if with_header:
        writer.writerow(COLUMNS)
    writer.writerows([_CONTROL.sub(" ", cell) for cell in astuple(row)] for row in rows)
    return text.getvalue().encode()


def read_index(path: Path) -> list[FrameRow]:
    """The whole rows, in their order; a last line that was cut off, or one of another length, is left out.

    Raises:
        OSError: it is not there or cannot be read.
        DamagedIndexError: its first line does not name the columns.
    """
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]
    if not lines or tuple(_cells(lines[0])) != COLUMNS:
        raise DamagedIndexError(f"{path} does not begin with {','.join(COLUMNS)}")
    rows = (_cells(line) for line in lines[1:])
    return [FrameRow(*cells) for cells in rows if len(cells) == len(COLUMNS)]


def _cells(line: str) -> Sequence[str]:
    try:
        return next(csv.reader([line.rstrip("\r")]), [])
    except csv.Error:
        return []
