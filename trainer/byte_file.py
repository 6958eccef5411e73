"""A file that is read at offsets, by any number of threads and forked processes."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.items import BadImageError

MOST_READ = 1 << 30  # Linux gives at most 2 GiB in one call


class ByteFile:
    """`path`, opened when it is first read, by each process for itself: a forked child would close its parent's when it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptors: dict[int, int] = {}  # by process

    def descriptor(self) -> int:
        """This process's own; raises OSError where it cannot be opened."""
        process = os.getpid()
        if process not in self._descriptors:
            opened = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            if self._descriptors.setdefault(process, opened) != opened:  # another thread was here first
                os.close(opened)
        return self._descriptors[process]

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes.

        Raises:
            BadImageError: they cannot be read, or the file ends before.
        """
        parts: list[bytes] = []
        try:
            while size > 0:
                part = os.pread(self.descriptor(), min(size, MOST_READ), offset)
                if not part:
                    raise BadImageError(f"lies beyond the end of {self.path.name}, which has been cut short")
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
        except OSError as error:
            raise BadImageError(f"cannot be read from {self.path.name}: {error.strerror or error}") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self) -> None:
        own = self.__dict__.get("_descriptors", {}).get(os.getpid())
        if own is not None:
            os.close(own)
