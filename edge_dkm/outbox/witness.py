"""The highest numbers that were committed, beside the database: SQLite ends a damaged WAL at its first bad frame and says nothing.

Written after each commit and never flushed: it survives `kill -9`, and after a power cut it may be behind, never ahead. Where it is
ahead of the database, commits were lost with the WAL, and it says which numbers must be declared instead of given again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_dkm.set_aside import set_aside

MAX_BYTES = 1_000_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """The newest seq of an epoch, and the newest cseq of each camera."""

    epoch: str
    seq: int
    newest: Mapping[str, int]


class Witness:
    """`seen`: what it held at the start, None where it is missing or no use."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seen = self._read()
        self._file = -1
        self._complained = False

    def note(self, seen: Seen) -> None:
        """Called after each commit; a disk that does not take it is said once."""
        data = json.dumps([seen.epoch, seen.seq, dict(seen.newest)]).encode()
        line = b"%08x %s\n" % (zlib.crc32(data), data)
        try:
            if self._file < 0:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.pwrite(self._file, line, 0)
        except OSError as error:
            if not self._complained:
                log.warning("%s cannot be written: %s; a damaged WAL would not be noticed", self._path, error.strerror)
            self._complained = True

    def close(self) -> None:
        """Releases the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _read(self) -> Seen | None:
        """What is behind the first line is of an earlier, longer one."""
        try:
            with self._path.open("rb") as file:
                line = file.read(MAX_BYTES).partition(b"\n")[0]
            crc, _, data = line.partition(b" ")
            if int(crc, 16) != zlib.crc32(data):
                return None
            epoch, seq, newest = json.loads(data)
            return Seen(str(epoch), int(seq), {str(camera): int(n) for camera, n in newest.items()})
        except (FileNotFoundError, ValueError, TypeError, AttributeError, RecursionError):
            return None
        except OSError:
            with contextlib.suppress(OSError):
                log.warning("S-CORRUPT %s is no file, moved to %s", self._path, set_aside(self._path))
            return None
