"""A bounded folder of frames on disk, oldest removed first: PNG files, index.csv and their embeddings. edge_dkm/frames/novel_frames.py fills it.

The order of writing makes every moment a readable one:

    add     PNG (temporary file, rename), embedding, row        cut off: a PNG without a row gets one at the next start, from its name
    remove  PNGs, then the index and embeddings as a whole      cut off: rows without a PNG are left out at the next start
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_dkm.frames.append_file import AppendFile, write_atomically
from edge_dkm.frames.embeddings import EmbeddingFile, forget
from edge_dkm.frames.index import INDEX, DamagedIndexError, FrameRow, index_bytes, read_index, row_of_name
from edge_dkm.set_aside import set_aside

MAX_ROWS = 20_000  # of small frames; the rows are held in memory
TRIMMED_TO = 0.9  # of a limit, so that not every new frame rewrites the index
FUTURE_S = 86_400.0  # a frame from beyond this was stamped by a clock that was wrong
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RingLimits:
    """Of one folder."""

    max_bytes: float
    max_age_s: float
    max_rows: int = MAX_ROWS


@dataclass(frozen=True)
class ModelSpace:
    """Whose embeddings are kept."""

    model_sha256: str
    n_dims: int


@dataclass(frozen=True)
class _Kept:
    row: FrameRow
    n_bytes: int


class FrameRing:
    """One camera's folder; for one thread. Opening mends what an end at a bad moment has left.

    Raises:
        OSError: it cannot be made, read or written.
    """

    def __init__(self, folder: Path, limits: RingLimits, space: ModelSpace | None = None) -> None:
        self.folder, self._limits = folder, limits
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._kept = _mended(folder)
        self._bytes = sum(kept.n_bytes for kept in self._kept)
        self._index = AppendFile(folder / INDEX)
        self._embeddings = None if space is None else EmbeddingFile(folder, space.model_sha256, space.n_dims)
        self._is_stale = True
        self._rewrite()

    @property
    def rows(self) -> list[FrameRow]:
        """What is kept, oldest first."""
        return [kept.row for kept in self._kept]

    @property
    def n_bytes(self) -> int:
        """All of it."""
        return self._bytes + len(self._index) + (0 if self._embeddings is None else len(self._embeddings))

    @property
    def is_over(self) -> bool:
        """Whether `trim` has something to do beside what grows old."""
        return self.n_bytes > self._limits.max_bytes or len(self._kept) > self._limits.max_rows

    def add(self, row: FrameRow, png: bytes, embedding: NDArray[np.float32]) -> None:
        """One more frame; `trim` afterwards.

        Raises:
            OSError: no room, or the disk fails; what was there is untouched.
        """
        path = self.folder / row.file
        write_atomically(path, png, is_synced=False)  # a flush per frame wears out cards; the start finds what was cut
        try:
            if self._embeddings is not None:
                self._embeddings.append(row.result_id, embedding)
            self._index.append(index_bytes([row], with_header=False))
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self._kept.append(_Kept(row, len(png)))
        self._bytes += len(png)

    def trim(self, now_s: float, is_clock_sure: bool = True) -> int:
        """Removes what is too old at `now_s` (seconds since 1970), and the oldest above the limits; returns how many.

        Args:
            is_clock_sure: what is of the future goes, too; of a clock that may stand at 1970 all frames would be.

        Raises:
            OSError: the disk fails; the next call goes on.
        """
        gone = self._excess(now_s, is_clock_sure)
        for kept in gone:
            (self.folder / kept.row.file).unlink(missing_ok=True)
            self._bytes -= kept.n_bytes
        if gone:
            names = {kept.row.file for kept in gone}
            self._kept = [kept for kept in self._kept if kept.row.file not in names]
            self._is_stale = True
        if self._is_stale:
            self._rewrite()
        return len(gone)

    def close(self) -> None:
        """Nothing is added after this."""
        self._index.close()
        if self._embeddings is not None:
            self._embeddings.close()

    def _excess(self, now_s: float, is_clock_sure: bool) -> list[_Kept]:
        latest_s = now_s + FUTURE_S if is_clock_sure else math.inf

        def is_old(kept: _Kept) -> bool:
            return not now_s - self._limits.max_age_s <= kept.row.taken_s <= latest_s

        old = [kept for kept in self._kept if is_old(kept)]
        left = [kept for kept in self._kept if not is_old(kept)] if old else self._kept
        n_bytes, n_rows = self.n_bytes - sum(kept.n_bytes for kept in old), len(left)
        if n_bytes <= self._limits.max_bytes and n_rows <= self._limits.max_rows:
            return old
        removed = 0
        for kept in left:
            if n_bytes <= TRIMMED_TO * self._limits.max_bytes and n_rows <= TRIMMED_TO * self._limits.max_rows:
                break
            n_bytes, n_rows, removed = n_bytes - kept.n_bytes, n_rows - 1, removed + 1
        return old + left[:removed]

    def _rewrite(self) -> None:
        data = index_bytes(self.rows, with_header=True)
        # At a start the file is new, mended, ends in a torn line, or is as it should be.
        if self._index.path.read_bytes() != data:
            self._index.replace(data)
        result_ids = {row.result_id for row in self.rows}
        if self._embeddings is not None:
            self._embeddings.keep(result_ids)
        for path in self.folder.glob("embeddings-*.bin"):
            if self._embeddings is None or path != self._embeddings.path:
                forget(path, result_ids)
        self._is_stale = False


def _mended(folder: Path) -> list[_Kept]:
    """What is whole, oldest first."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)
    rows = _readable_index(folder / INDEX)
    files = {path.name: path for path in folder.iterdir() if row_of_name(path.name) is not None}
    whole = {name: size for name, path in files.items() if (size := _whole_size(path))}
    for name in files.keys() - whole.keys():
        files[name].unlink(missing_ok=True)
    known = {row.file: row for row in rows if row.file in whole}
    lost = [row for name in whole.keys() - known.keys() if (row := row_of_name(name)) is not None]
    found = sorted(lost, key=lambda row: row.ts)
    if len(known) < len(rows) or found:
        log.warning(
            "%s: %d rows had no frame, %d frames had no row; mended", folder, len(rows) - len(known), len(found)
        )
    return [_Kept(row, whole[row.file]) for row in (*known.values(), *found)]


def _readable_index(path: Path) -> list[FrameRow]:
    try:
        return read_index(path)
    except FileNotFoundError:
        return []
    except (DamagedIndexError, IsADirectoryError) as error:
        if path.is_dir() or path.stat().st_size:
            log.warning("S-CORRUPT %s, moved to %s", error, set_aside(path))
        return []


def _whole_size(path: Path) -> int:
    """Bytes of a PNG that has its end; 0 for one that a power cut has shortened."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - len(PNG_END)))
            return size if file.read() == PNG_END else 0
    except OSError:
        return 0


def ring_folders(frames: Path) -> Iterator[Path]:
    """The folders of a station's frames, one for each camera that it has or had."""
    if frames.is_dir():
        yield from sorted(path for path in frames.iterdir() if path.is_dir())
