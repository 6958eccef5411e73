"""Writes files so that a reader sees the old one or the new one, whoever else is writing, and whenever the power goes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from safetensors.torch import save
from torch import Tensor


def write_whole(path: Path, content: str | bytes, previous: Path | None = None) -> None:
    """Writes text (UTF-8) or bytes: a temporary file of its own in the same folder, fsync, rename.

    Args:
        previous: where the file that is there now goes; between the two renames, `path` is not there.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            with contextlib.suppress(FileNotFoundError):
                path.replace(previous)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def link_whole(path: Path, name: Path) -> None:
    """Makes `name` another name of the file at `path`; where the file system knows no links, nothing."""
    temporary = _temporary(name)
    with contextlib.suppress(OSError):
        temporary.hardlink_to(path)
        temporary.replace(name)
    temporary.unlink(missing_ok=True)  # a rename to another name of the same file does nothing


def remove_unfinished(path: Path) -> None:
    """Removes what writers of `path` left behind that were killed; nobody else may be writing it."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, and its folder where that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, dict(header or {})))


def _temporary(path: Path) -> Path:
    """One of the names that `remove_unfinished` knows."""
    return path.with_name(f".{path.name}.{uuid4().hex}.tmp")


def _sync(folder: Path) -> None:
    """A rename outlives a power cut once its folder is written; some systems cannot be asked to."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
