"""Deals a station's groups to what they serve: centres, radii, calibration, and the newest ones to the check, as design and trainer do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_dkm.recentring.reservoir import Rows

Mask = NDArray[np.bool_]

CENTRE, RADIUS = 0.6, 0.1  # of the groups that are not kept for the check; the rest calibrates
CHECK = 0.1


@dataclass(frozen=True)
class Shares:
    """Masks over the rows (N,); no group is in two of them."""

    centre: Mask
    radius: Mask
    calibration: Mask
    check: Mask


def deal(rows: Rows, rng: np.random.Generator) -> Shares:
    """At least four groups are needed. The check gets the newest groups, by their last part: what the line makes now."""
    groups, index = np.unique(rows.group, return_inverse=True)
    last = np.zeros(len(groups), np.int64)
    np.maximum.at(last, index, rows.seq)
    by_age = np.argsort(last, kind="stable")
    n_check = max(1, round(CHECK * len(groups)))
    older = rng.permutation(by_age[:-n_check])
    n_radius = max(1, round(RADIUS * len(older)))
    n_centre = max(1, round(CENTRE * len(older)))
    ends = n_centre, n_centre + n_radius

    def mask(chosen: NDArray[np.int64]) -> Mask:
        return np.isin(index, chosen)

    return Shares(
        mask(older[: ends[0]]), mask(older[ends[0] : ends[1]]), mask(older[ends[1] :]), mask(by_age[-n_check:])
    )
