"""The folder in which a provider keeps what it has compiled of one model. It may be deleted at any time; a line never stops for want of it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


def made(folder: Path | None) -> Path | None:
    """The folder, made private to this user; None, with a warning, where it cannot be used."""
    if folder is None:
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as error:
        log.warning("cache %s cannot be used (%s); every start compiles anew", folder, error.strerror or error)
        return None
    if is_empty and not os.access(folder, os.W_OK):  # one that is filled is of use on a read-only mount too
        log.warning("cache %s is empty and cannot be written; every start compiles anew", folder)
        return None
    return folder


def is_filled(folder: Path | None) -> bool:
    """Whether anything lies in it that can be seen."""
    try:
        return folder is not None and any(folder.iterdir())
    except OSError:
        return False


@contextlib.contextmanager
def renewed(folder: Path) -> Iterator[Path | None]:
    """An empty folder in place of this one, whose content is deleted when the block has ended well and put back when it raises.

    So an engine that took minutes is not lost to an error that it has nothing to do with. None where it cannot be moved (another user's,
    a read-only mount): then the block has to do without.
    """
    try:
        old = Path(tempfile.mkdtemp(prefix=f"{folder.name}.old-", dir=folder.parent))
    except OSError as error:
        _warn(folder, error)
        yield None
        return
    try:
        folder.rename(old)  # onto an empty folder
        folder.mkdir(mode=0o700)
    except OSError as error:
        _put_back(old, folder)
        _warn(folder, error)
        yield None
        return
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        _put_back(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if old.exists():
        log.warning("%s, compiled earlier and of no use, cannot be deleted; delete it by hand", old)


def _put_back(old: Path, folder: Path) -> None:
    try:
        if is_filled(old):
            old.rename(folder)
        else:
            old.rmdir()
    except OSError as error:
        log.warning("%s cannot be put back to %s: %s", old, folder, error.strerror or error)


def _warn(folder: Path, error: OSError) -> None:
    log.warning("cache %s cannot be renewed (%s); it is left alone and not used", folder, error.strerror or error)
