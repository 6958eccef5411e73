"""A file that only grows, a whole piece at a time: what a full disk or `kill -9` cuts off is taken back, so that the next piece fits."""

from __future__ import annotations

import errno
import os
from pathlib import Path


class AppendFile:
    """Bytes appended to `path` unbuffered: with `append` they are with the kernel. For one thread.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._length = self._file.seek(0, os.SEEK_END)

    def __len__(self) -> int:
        return self._length

    def append(self, data: bytes) -> None:
        """All of it or nothing.

        Raises:
            OSError: no room, or the disk fails.
        """
        rest = memoryview(data)
        try:
            while rest:
                written = self._file.write(rest)
                if not written:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                rest = rest[written:]
        except OSError:
            self._file.truncate(self._length)
            raise
        self._length += len(data)

    def replace(self, data: bytes) -> None:
        """Another content, at once: a reader sees the old one or the new one, also after a power cut.

        Raises:
            OSError: no room, or the disk fails; the old content stays.
        """
        write_atomically(self.path, data)
        self._file.close()
        self._file = self.path.open("ab", buffering=0)
        self._length = len(data)

    def close(self) -> None:
        """Nothing is appended after this."""
        self._file.close()


def write_atomically(path: Path, data: bytes, *, is_synced: bool = True) -> None:
    """Writes `path` through `.<name>.tmp` beside it. Without `is_synced` a power cut, but no crash of ours, may leave it cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if is_synced:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
