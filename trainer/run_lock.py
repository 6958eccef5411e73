"""One run folder, one training: what a second one would overwrite is the first one's pixels, log and checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import DataError


@contextlib.contextmanager
def only_one_in(folder: Path) -> Iterator[None]:
    """Makes the run folder and holds it for as long as the block runs; the system lets go of it however this process ends.

    Raises:
        DataError: another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process trains into {folder} now; wait until it ends, or choose another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
