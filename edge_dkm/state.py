"""The state folder of a station: made private, held by one process at a time."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path
from types import TracebackType

from edge_dkm.errors import LockedError, StorageError
from edge_dkm.set_aside import set_aside

LOCK = "lock"
log = logging.getLogger(__name__)


class StateFolder:
    """Creates the folder with mode 0700 and locks it until `close`.

    Raises:
        StorageError: it cannot be made or written.
        LockedError: another process holds it; its pid is in the message.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make_room(path / LOCK)
            self._file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(f"S-IO state folder {path} cannot be used: {error.strerror or error}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._file, 20).decode("ascii", "replace").strip()
            os.close(self._file)
            raise LockedError(
                f"S-LOCKED state folder {path} is held by process {holder or '?'}; stop it, or give this line a state folder of its own"
            ) from None
        try:
            os.ftruncate(self._file, 0)
            os.write(self._file, f"{os.getpid()}\n".encode())
        except OSError as error:
            os.close(self._file)
            raise StorageError(f"S-IO state folder {path} cannot be written: {error.strerror or error}") from None

    @property
    def outbox(self) -> Path:
        """The outbox database."""
        return self.path / "outbox.db"

    def free_mb(self) -> int:
        """Free space of the file system in megabytes."""
        info = os.statvfs(self.path)
        return int(info.f_bavail * info.f_frsize // 1_000_000)

    def close(self) -> None:
        """Releases the lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> StateFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _make_room(path: Path) -> None:
    if path.is_dir():
        log.warning("S-CORRUPT %s is a folder, moved to %s", path, set_aside(path))
