"""A histogram of fixed buckets, filled by the pipeline's threads and read at scrape time. In itself it needs no Prometheus."""

from __future__ import annotations

import bisect
import itertools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

INFER_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
NOVELTY = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0)  # 1.0: the edge at the target false-reject rate


@dataclass(frozen=True)
class HistogramCounts:
    """How many values were at most each bound (cumulative), how many in all, and their sum."""

    bounds: tuple[float, ...]
    at_most: tuple[int, ...]
    count: int
    total: float


class Histogram:
    """Counts values by upper bounds, which rise. Values that are not finite are not counted."""

    def __init__(self, bounds: Sequence[float]) -> None:
        if not bounds or any(a >= b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"histogram bounds are {list(bounds)}, expected at least one, rising")
        self._bounds = tuple(float(bound) for bound in bounds)
        self._lock = threading.Lock()
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """One value more."""
        if not math.isfinite(value):
            return
        place = bisect.bisect_left(self._bounds, value)
        with self._lock:
            self._counts[place] += 1
            self._total += value

    def counts(self) -> HistogramCounts:
        """All of one moment."""
        with self._lock:
            counts, total = list(self._counts), self._total
        at_most, running = [], 0
        for n in counts[:-1]:
            running += n
            at_most.append(running)
        return HistogramCounts(self._bounds, tuple(at_most), running + counts[-1], total)
