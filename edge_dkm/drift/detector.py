"""Sequential tests that the means of many statistics in [0, 1] stay inside their intervals, with a bound on false alarms.

For a statistic x, its upper bound u and a stake l in (0, 1/u), L = 1 + l (x - u) is at least 0 and has a mean of at most 1 as long as
the mean of x, given the past, is at most u: a fair or losing bet. Started anew at every time and the best start kept,

    S <- max(S, 1) L          M = mean of S over a grid of stakes

is an e-detector in its CUSUM form (Shin, Ramdas and Rinaldo 2022, arXiv 2203.03532, definitions 2.2 and 2.6, section 4): E[M at any stopping
time] <= E[that time]. With J tests, the alarm at the first M_j >= J n comes on average after n observations or later, whatever else the
distribution is, and however the tests depend on one another. The lower bound is the same test of 1 - x.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STAKES = (
    0.004,
    0.012,
    0.04,
    0.12,
    0.35,
    0.9,
)  # shares of the largest stake 1/u: rare events want small ones, ranks large ones
SMALLEST_BOUND = 1e-6
ROOM = 3.0  # evidence is capped this far (in logarithms) above the alarm, so that it does not grow for ever

Vector = NDArray[np.float64]


class MeanDetector:
    """S two-sided tests. `false_alarm_every`: observations to the first false alarm, on average and at least, over all of them.

    Args:
        low, high: (S,) intervals of the means; outside [0, 1] a side is never left.
        n_tests: further detectors that share the one promise are counted here (default: 2 S).
    """

    def __init__(self, low: Vector, high: Vector, false_alarm_every: float, n_tests: int | None = None) -> None:
        self.n_statistics = len(low)
        self.alarm_at = float(np.log(false_alarm_every) + np.log(max(n_tests or 2 * self.n_statistics, 1)))
        self._log = np.zeros((len(STAKES), 2 * self.n_statistics))
        self.bound(low, high)

    def bound(self, low: Vector, high: Vector) -> None:
        """Other intervals from the next observation on; the evidence so far stays (they must not depend on what is to come)."""
        self.low, self.high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        self._bound = np.maximum(np.concatenate([self.high, 1 - self.low]), SMALLEST_BOUND)
        self._stake = np.array(STAKES)[:, None] / self._bound

    def observe(self, x: Vector) -> None:
        """One observation (S,) in [0, 1]; NaN where a statistic has none."""
        both = np.concatenate([x, 1 - x])
        gain = np.log1p(self._stake * (both - self._bound))
        np.maximum(self._log, 0.0, out=self._log)
        self._log += np.where(np.isnan(gain), 0.0, gain)
        np.minimum(self._log, self.alarm_at + ROOM, out=self._log)

    @property
    def evidence(self) -> Vector:
        """(S, 2) logarithms of M: that the mean lies below, above its interval."""
        top = self._log.max(axis=0)
        mixed = top + np.log(np.exp(self._log - top).mean(axis=0))
        return np.stack([mixed[self.n_statistics :], mixed[: self.n_statistics]], axis=1)

    def alarms(self) -> NDArray[np.bool_]:
        """(S, 2) below, above."""
        return np.asarray(self.evidence >= self.alarm_at)

    def forget(self, which: NDArray[np.bool_]) -> None:
        """Starts the tests of these statistics (S,) anew."""
        self._log[:, np.concatenate([which, which])] = 0.0
