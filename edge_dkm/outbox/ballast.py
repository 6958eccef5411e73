"""A file that only takes up room: given up when the disk is full, so that the outbox can still write what lets it drain."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from edge_dkm.set_aside import set_aside

log = logging.getLogger(__name__)


class Ballast:
    """`size_bytes` of disk space held in reserve at `path`; 0 holds none. No error of its own: without room there is no ballast."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path, self.size_bytes = path, size_bytes

    @property
    def is_held(self) -> bool:
        """Whether the room is reserved, or none is wanted."""
        try:
            return self.path.stat().st_size >= self.size_bytes and not self.path.is_dir()
        except OSError:
            return self.size_bytes == 0

    def restore(self, factor: float = 2) -> bool:
        """Reserves the room once more than `factor` times it is free; whether it is held now."""
        if self.is_held:
            return True
        try:
            info = os.statvfs(self.path.parent)
            if info.f_bavail * info.f_frsize <= factor * self.size_bytes:
                return False
            if self.path.is_dir():
                log.warning("S-CORRUPT %s is a folder, moved to %s", self.path, set_aside(self.path))
            self._fill()
        except OSError as error:
            log.debug("no ballast: %s", error)
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            return False
        return True

    def _fill(self) -> None:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, self.size_bytes)  # blocks, not a hole
            else:
                left = self.size_bytes
                while left > 0:
                    left -= os.write(file, bytes(min(left, 65_536)))
        finally:
            os.close(file)

    def release(self) -> bool:
        """Gives the room back; False where there was none to give."""
        try:
            self.path.unlink()
        except OSError:
            return False
        log.warning("S-FULL the disk of %s is full; its ballast of %d bytes is given up", self.path, self.size_bytes)
        return True
