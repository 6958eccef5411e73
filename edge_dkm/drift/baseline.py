"""How the station itself runs: means of the statistics over its own first parts, far more parts than the training set has groups.

The training reference cannot see a new class of 2 %: sixty groups without one do not exclude it. Thousands of parts of the running line
do. So a line is watched against the reference from its first part on, and against its own beginning once that is known.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_dkm.drift.reference import Means, intervals, student

BATCHES = 120
FIRST_BATCHES = 40  # the first intervals; they are narrowed each time as many have come again
Z = 3.5  # normal quantile of the intervals of ranks: 2 in 10,000 on each side
Z_RARE = (
    3.0  # of events, 1 in 1,000: a rate just above such a bound takes the test far longer than one that has multiplied
)

Vector = NDArray[np.float64]


class Baseline:
    """Takes observations (S,) until it has enough of them, in BATCHES batches: means of batches show what correlates inside.

    Args:
        rare: (S,) which statistics are events.
        observations: so many fill it.
    """

    def __init__(self, rare: NDArray[np.bool_], observations: int) -> None:
        self._rare, self._size = rare, max(1, -(-observations // BATCHES))
        self._means: list[Vector] = []
        self._begin()

    def _begin(self) -> None:
        self._sum, self._seen, self._n = np.zeros(len(self._rare)), np.zeros(len(self._rare)), 0

    @property
    def is_full(self) -> bool:
        """Whether it takes no more."""
        return len(self._means) >= BATCHES

    def observe(self, x: Vector) -> bool:
        """One observation, NaN where a statistic has none; whether `interval` has changed by it."""
        if self.is_full:
            return False
        is_there = ~np.isnan(x)
        self._sum += np.where(is_there, x, 0.0)
        self._seen += is_there
        self._n += 1
        if self._n < self._size:
            return False
        self._means.append(np.where(self._seen > 0, self._sum / np.maximum(self._seen, 1), np.nan))
        self._begin()
        return len(self._means) % FIRST_BATCHES == 0

    def interval(self) -> tuple[Vector, Vector]:
        """(S,) between which the means stay if the line goes on as it began; all of [0, 1] for a statistic that was not always there."""
        batches = np.array(self._means)
        mean, variance = batches.mean(axis=0), batches.var(axis=0, ddof=1)
        # Events in batches scatter more than independent ones would: as if there were fewer observations.
        independent = np.maximum(mean * (1 - mean), 1e-12) / self._size
        count = len(batches) * self._size / np.maximum(variance / independent, 1.0)
        means = Means(mean, np.sqrt(variance / len(batches)), count)
        return intervals(means, self._rare, student(Z, len(batches)), Z_RARE)
