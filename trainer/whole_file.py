"""Writes files so that a reader sees the old one or the new one, whoever else is writing, and whenever the power goes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from safetensors.torch import save
from torch import Tensor


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes text (UTF-8) or bytes: a temporary file of its own in the same folder, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, and its folder where that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, dict(header or {})))
