"""Names of clusters that belong to a class: the class's own where it has one cluster, numbered where it has several."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

MAX_LENGTH = 50  # room for the number: a name in labels.yaml has at most 60


def class_names(owners: Sequence[int], classes: Sequence[str], unowned: str = "unsure") -> list[str]:
    """One name per cluster (K,), all different.

    Args:
        owners: the class of each cluster, -1 where none owns it.
        classes: names of the classes.
    """
    wanted = [classes[owner][-MAX_LENGTH:] if owner >= 0 else unowned for owner in owners]
    names: list[str] = []
    taken = {name for name in wanted if wanted.count(name) == 1}  # a class may itself be called "scratch-1"
    for name in wanted:
        numbered = (f"{name}-{n}" for n in itertools.count(1))
        unique = (
            name if name in taken and name not in names else next(other for other in numbered if other not in taken)
        )
        taken.add(unique)
        names.append(unique)
    return names


def class_of(name: str, classes: Sequence[str]) -> int:
    """The class that `class_names` gave this name for, -1 where none owns the cluster."""
    own = [cls[-MAX_LENGTH:] for cls in classes]
    base = name if name in own else name.rpartition("-")[0]
    return own.index(base) if base in own else -1
