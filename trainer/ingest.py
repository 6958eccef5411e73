"""Gathers frames of recordings and stations' rings into one folder that `dkm-train fit` reads. `dkm-train ingest` calls it."""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from trainer.errors import DataError
from trainer.items import BadImageError, decode
from trainer.recordings import COLUMNS, INDEX, FrameRow, find_folders, read_recording
from trainer.whole_file import write_whole

PNG_START, PNG_END = b"\x89PNG", b"\x00\x00\x00\x00IEND\xaeB`\x82"


@dataclass(frozen=True)
class Wanted:
    """Which frames; empty or None: all. A frame without a score or a time fails a filter on it. `limit`: evenly spaced over the rest."""

    since: datetime | None = None
    until: datetime | None = None
    verdicts: Sequence[str] = ()
    clusters: Sequence[str] = ()
    cameras: Sequence[str] = ()
    novelty: tuple[float | None, float | None] = (None, None)
    limit: int | None = None

    def refusal(self, row: FrameRow) -> str | None:
        """Why a row is not wanted; None where it is."""
        for name, wanted in (("camera", self.cameras), ("verdict", self.verdicts), ("cluster", self.clusters)):
            if wanted and row.cells[name] not in wanted:
                return name
        if self.since is not None or self.until is not None:
            taken = row.taken
            if taken is None or (self.since and taken < self.since) or (self.until and taken >= self.until):
                return "time"
        low, high = self.novelty
        if low is not None or high is not None:
            score = row.novelty_score
            if score is None or (low is not None and score < low) or (high is not None and score > high):
                return "novelty"
        return None


@dataclass(frozen=True)
class Ingested:
    """What was gathered. `left_out`: reason -> number; `size`: (w, h) of the frames; `notes`: what to know before training."""

    folder: Path
    kept: int
    linked: int
    copied: int
    groups: int
    size: tuple[int, int]
    left_out: dict[str, int]
    by_source: dict[str, int]
    notes: list[str]

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "folder": str(self.folder)}

    def text(self) -> str:
        """For people."""
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(self.left_out.items()))
        lines = [
            f"ingested  {self.kept} frames of {self.groups} groups, {self.size[0]}x{self.size[1]}, in {self.folder} "
            f"({self.linked} linked, {self.copied} copied)",
            *(f"from      {source}: {n}" for source, n in self.by_source.items()),
            f"left out  {reasons or 'none'}",
            *(f"WARNING   {note}" for note in self.notes),
            f"next      dkm-train fit CONFIG --set data.path={self.folder}",
        ]
        return "\n".join(lines)


@dataclass
class _Found:
    """A frame that is wanted and whole."""

    row: FrameRow
    source: Path
    size: tuple[int, int]
    group: str = ""
    name: str = ""


@dataclass
class _Sieve:
    """What is left out on the way, and what was seen before."""

    left_out: Counter[str] = field(default_factory=Counter)
    digests: set[str] = field(default_factory=set)

    @property
    def reasons(self) -> dict[str, int]:
        """Those that there were."""
        return {reason: n for reason, n in self.left_out.items() if n}

    def check(self, found: Sequence[_Found], sources: Sequence[Path]) -> None:
        """Raises DataError where nothing is left."""
        if not found:
            reasons = ", ".join(f"{reason} {n}" for reason, n in self.reasons.items()) or "there are no rows"
            raise DataError(f"no frame of {', '.join(map(str, sources))} is left ({reasons})")

    def size(self, row: FrameRow) -> tuple[int, int] | None:
        """(w, h) of a whole picture that was not seen before."""
        try:
            data = row.path.read_bytes()
        except OSError:
            self.left_out["missing file"] += 1
            return None
        digest = hashlib.sha256(data).hexdigest()
        if digest in self.digests:
            self.left_out["duplicate"] += 1
            return None
        try:
            if data.startswith(PNG_START) and not data.endswith(PNG_END):
                raise BadImageError("ends early")  # the decoder would fill in the rest
            height, width = decode(data).shape[:2]
        except BadImageError:
            self.left_out["unreadable"] += 1
            return None
        self.digests.add(digest)
        return width, height


def ingest(sources: Sequence[Path], out: Path, wanted: Wanted | None = None) -> Ingested:
    """Links (else copies) what is wanted into `out`, with an index.csv in the layout of a recording.

    Groups of different sources stay apart: both may have a part 1. Frames of another size than most are left out, since a training set has one.

    Raises:
        DataError: a source is none, `out` is taken or cannot be written, or nothing is left.
    """
    wanted = wanted or Wanted()
    _check(sources, out)
    sieve = _Sieve()
    found: list[_Found] = []
    for source in sources:
        for folder in find_folders(source):
            recording = read_recording(folder)
            sieve.left_out["bad row"] += recording.bad_rows
            for row in recording.rows:
                refusal = wanted.refusal(row)
                if refusal is not None:
                    sieve.left_out[refusal] += 1
                elif (size := sieve.size(row)) is not None:
                    found.append(_Found(row, source, size))
    found = _of_one_size(found, sieve)
    if wanted.limit is not None and wanted.limit < len(found):
        sieve.left_out["limit"] += len(found) - wanted.limit
        found = [found[n * len(found) // wanted.limit] for n in range(wanted.limit)]
    sieve.check(found, sources)
    _name(found, sources)
    before = len(found)
    found, linked = _write(found, out)
    sieve.left_out["missing file"] += before - len(found)
    sieve.check(found, sources)
    return Ingested(
        folder=out,
        kept=len(found),
        linked=linked,
        copied=len(found) - linked,
        groups=len({(one.row.cells["camera"], one.group) for one in found}),
        size=found[0].size,
        left_out=sieve.reasons,
        by_source={str(source): sum(one.source == source for one in found) for source in sources},
        notes=_notes(found),
    )


def _check(sources: Sequence[Path], out: Path) -> None:
    if (out / INDEX).exists():
        raise DataError(f"{out} already holds a recording; choose another --out")
    for source in sources:
        if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
            raise DataError(f"--out {out} lies in the source {source}; choose a place outside of it")
    if len({source.resolve() for source in sources}) < len(sources):
        raise DataError(f"a source is named twice: {', '.join(map(str, sources))}")


def _of_one_size(found: list[_Found], sieve: _Sieve) -> list[_Found]:
    if not found:
        return found
    ((most, count),) = Counter(one.size for one in found).most_common(1)
    sieve.left_out["other size"] += len(found) - count
    return [one for one in found if one.size == most]


def _name(found: list[_Found], sources: Sequence[Path]) -> None:
    """Names and groups that do not meet those of another source."""
    taken: set[str] = set()
    for one in found:
        group = one.row.cells["group"] or one.row.cells["file"]
        one.group = group if len(sources) == 1 else f"{sources.index(one.source) + 1}:{group}"
        plain = one.row.cells["file"].replace("/", "__")
        stem, dot, suffix = plain.rpartition(".")
        name, n = plain, 2
        while name.lower() in taken or name == INDEX:
            name, n = f"{stem}-{n}{dot}{suffix}", n + 1
        taken.add(name.lower())
        one.name = name


def _write(found: list[_Found], out: Path) -> tuple[list[_Found], int]:
    """Returns what was still there, and how many of it are links. The index comes last: a folder that was cut off is none yet."""
    written: list[_Found] = []
    linked = 0
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for one in found:
            is_link = _place(one.row.path, out / one.name)
            if is_link is None:
                continue
            written.append(one)
            linked += is_link
            writer.writerow(list({**one.row.cells, "file": one.name, "group": one.group}.values()))
        if written:
            write_whole(out / INDEX, text.getvalue())
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from None
    return written, linked


def _place(original: Path, target: Path) -> bool | None:
    """Whether it could be linked; None where a ring in use has let go of it since. A link outlives the ring's own name of it."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(original)
    except OSError:
        if not original.exists():
            return None
        shutil.copy2(original, target)
        return False
    return True


def _notes(found: list[_Found]) -> list[str]:
    notes = []
    rois = {(one.row.cells["camera"], one.row.cells["roi"]) for one in found if one.row.cells["roi"]}
    if len({roi for _, roi in rois}) > 1:
        shown = "; ".join(f"{camera} {roi}" for camera, roi in sorted(rois)[:4])
        notes.append(f"the frames have several ROIs ({shown}): a model of them cannot check the ROI of its line")
    verdicts = Counter(one.row.cells["verdict"] for one in found)
    strange = verdicts["review"] + verdicts["reject"]
    if strange:
        notes.append(
            f"{strange} of {len(found)} frames were judged review or reject: look at them before they count as good parts"
        )
    return notes
