"""How many of n new good parts may be called novel before chance is no explanation any more: the beta-binomial interval, without scipy.

The share of new parts above the k-th smallest of G calibration scores is Beta(G + 1 - k, k) distributed (order statistics of a uniform
sample; Vovk 2012, "Conditional validity of inductive conformal predictors", arXiv 1209.2673), so the count among n is beta-binomial.
"""

from __future__ import annotations

import math

import numpy as np

COVERAGE = 0.95


def false_reject_interval(above: float, below: float, n: int, coverage: float = COVERAGE) -> tuple[int, int]:
    """The central interval of BetaBinomial(n, above, below), as counts.

    Args:
        above: G + 1 - k: the calibration weight beyond the edge, and one.
        below: k: the weight at or below the edge; greater than 0.
    """
    counts = range(n + 1)
    log_pmf = [_log_choose(n, x) + _log_beta(x + above, n - x + below) - _log_beta(above, below) for x in counts]
    cdf = np.cumsum(np.exp(log_pmf))
    tail = (1 - coverage) / 2
    low, high = (int(np.searchsorted(cdf, q - 1e-12)) for q in (tail, 1 - tail))
    return min(low, n), min(high, n)


def _log_choose(n: int, x: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(x + 1) - math.lgamma(n - x + 1)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
