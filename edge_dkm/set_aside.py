"""Moves a damaged file of the state folder out of the way, so that the line starts and the file can be looked at later."""

from __future__ import annotations

import itertools
from pathlib import Path


def set_aside(path: Path) -> Path:
    """Renames to the first free `<name>.corrupt-N` beside it and returns that.

    Raises:
        OSError: it cannot be renamed.
    """
    target = next(
        candidate
        for n in itertools.count(1)
        if not (candidate := path.with_name(f"{path.name}.corrupt-{n}")).exists() and not candidate.is_symlink()
    )
    path.rename(target)
    return target
