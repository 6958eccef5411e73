"""Folders of frames with an index.csv, wherever they come from: `edge-dkm record`, a station's ring of novel frames, an earlier ingest.

Read more forgivingly than trainer/images.py does, since a ring may be in use or half mended while it is read. trainer/ingest.py calls it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from trainer.errors import DataError
from trainer.images import RECORD_COLUMNS

INDEX = "index.csv"
COLUMNS = ("file", "camera", "ts", "group", "result_id", "cluster", "novelty_score", "verdict", "roi", "frame")


@dataclass(frozen=True)
class FrameRow:
    """One frame of an index: `cells` has all of COLUMNS, empty where the index has no such column or value."""

    folder: Path
    cells: dict[str, str]

    @property
    def path(self) -> Path:
        """Its picture."""
        return self.folder / self.cells["file"]

    @property
    def taken(self) -> datetime | None:
        """When it was captured; None where `ts` is no time."""
        return parse_time(self.cells["ts"])

    @property
    def novelty_score(self) -> float | None:
        """None where it was recorded without a model."""
        try:
            return float(self.cells["novelty_score"])
        except ValueError:
            return None


@dataclass(frozen=True)
class Recording:
    """One folder's rows; `bad_rows` were cut off, or name no file of this folder."""

    folder: Path
    rows: list[FrameRow]
    bad_rows: int


def parse_time(text: str) -> datetime | None:
    """An ISO 8601 date or time; without a zone it is UTC. None where it is none."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def find_folders(source: Path) -> list[Path]:
    """The folders with an index.csv that `source` stands for: itself, those of a station's state folder, or those right below it.

    Raises:
        DataError: there is none.
    """
    for candidates in ([source], _below(source / "frames"), _below(source)):
        found = [folder for folder in candidates if (folder / INDEX).is_file()]
        if found:
            return found
    what = "does not exist" if not source.exists() else "holds no index.csv"
    raise DataError(
        f"{source} {what}; expected a folder of `edge-dkm record`, a station's state folder (with frames/CAMERA/), or one of its frames folders"
    )


def read_recording(folder: Path) -> Recording:
    """Its rows, in their order.

    Raises:
        DataError: the index cannot be read, or its first line does not name the columns.
    """
    path = folder / INDEX
    try:
        # Not splitlines: a part's number may hold what is an end of line to Unicode alone.
        lines = path.read_bytes().decode("utf-8-sig", "replace").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    header = next(_parsed(lines[:1]), [])
    if not set(header) >= RECORD_COLUMNS:
        raise DataError(
            f"{path} has the columns {', '.join(header) or 'none'}, expected {', '.join(COLUMNS)} (half written? a station mends its own at its start)"
        )
    rows, bad = [], 0
    for cells in _parsed(lines[1:]):
        row = dict.fromkeys(COLUMNS, "") | dict(zip(header, cells, strict=False))
        if len(cells) == len(header) and _is_inside(row["file"]):
            rows.append(FrameRow(folder, {name: row[name] for name in COLUMNS}))
        else:
            bad += 1
    return Recording(folder, rows, bad)


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _parsed(lines: list[str]) -> Iterator[list[str]]:
    """Line by line: an open quote in a torn line must not swallow the lines after it."""
    for line in lines:
        if not line.strip("\0 "):
            continue
        try:
            yield next(csv.reader([line]), [])
        except csv.Error:
            yield []


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts
