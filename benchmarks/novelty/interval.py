"""How many of some new good parts may be called novel, if the promise of novelty holds."""

from __future__ import annotations

import math

from scipy.stats import betabinom


def false_reject_interval(calibration: int, test: int, target_frr: float) -> tuple[int, int]:
    """The central 95 % for the number flagged among `test` new good parts: of BetaBinomial(test, n + 1 - k, k), n of `calibration`.

    The share of new good parts above the k-th of n calibration scores is Beta distributed (k = ceil((1 - alpha)(n + 1))). n and `test` are
    groups, of which one part each is tested.
    """
    k = math.ceil((1 - target_frr) * (calibration + 1) - 1e-9)  # .95 x 20 is 19, and a bit more in floating point
    low, high = betabinom(test, calibration + 1 - k, k).interval(0.95)
    return int(low), int(high)
