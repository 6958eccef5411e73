"""How the line is now: means over about the last 300 parts, forgetting exponentially."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MEMORY_PARTS = 300

Vector = NDArray[np.float64]


class Recent:
    """Means of vectors (S,); an entry that is NaN leaves its mean as it was. The first parts weigh equally."""

    def __init__(self, size: int) -> None:
        self.mean = np.full(size, np.nan)
        self._n = np.zeros(size)

    def observe(self, x: Vector, parts: int = 1) -> None:
        """One observation that stands for so many parts."""
        is_there = ~np.isnan(x)
        self._n += is_there * parts
        weight = np.minimum(np.maximum(parts / np.maximum(self._n, 1), parts / MEMORY_PARTS), 1.0)
        before = np.where(np.isnan(self.mean), x, self.mean)
        self.mean = np.where(is_there, before + weight * (x - before), self.mean)
