"""Splits a data set by group into train, radius (F) and calibration (C), so that calibration parts are of groups never trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from configs import Settings
from trainer.data import Dataset
from trainer.errors import DataError

Index = NDArray[np.int64]


LARGE_GROUP = 0.1  # of the good parts: to calibrate it counts as one group, to learn from it is worth its parts


class Shares(Settings):
    """Shares of the groups of good parts."""

    train: float = Field(0.6, gt=0, lt=1)
    radius: float = Field(0.1, gt=0, lt=1)
    calibration: float = Field(0.3, gt=0, lt=1)

    @model_validator(mode="after")
    def _sum_to_one(self) -> Shares:
        total = self.train + self.radius + self.calibration
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + radius + calibration sum to {total:g}, expected 1")
        return self


@dataclass(frozen=True)
class Split:
    """Indices into the data set; `left_out` are known defects of groups that are held out (they would leak)."""

    train: Index
    radius: Index
    calibration: Index
    left_out: Index

    @property
    def is_calibrated(self) -> bool:
        """Whether there are held-out parts to calibrate novelty on."""
        return len(self.calibration) > 0


def split_all_train(dataset: Dataset) -> Split:
    """`novelty: none`: everything trains."""
    none = np.array([], np.int64)
    return Split(np.arange(len(dataset)), none, none, none)


def split_by_group(dataset: Dataset, shares: Shares, seed: int) -> Split:
    """Deals the groups that hold good parts to the three splits at random; one that holds more than LARGE_GROUP of them trains.

    Raises:
        DataError: fewer than three such groups.
    """
    groups = np.unique(dataset.groups[dataset.good])
    if len(groups) < 3:
        raise DataError(
            f"{len(groups)} group(s) of good parts cannot be split into train, radius and calibration, expected at least 3; "
            f"add images of other parts, or set novelty: none"
        )
    order = _large_first(np.random.default_rng((seed, 7)).permutation(groups), dataset)
    n_radius = max(1, round(shares.radius * len(groups)))
    n_calibration = max(1, round(shares.calibration * len(groups)))
    n_train = max(1, len(groups) - n_radius - n_calibration)
    of_radius = np.isin(dataset.groups, order[n_train : n_train + n_radius])
    of_calibration = np.isin(dataset.groups, order[n_train + n_radius :])
    held_out = of_radius | of_calibration
    return Split(
        *(
            np.flatnonzero(mask)
            for mask in (~held_out, of_radius & dataset.good, of_calibration & dataset.good, held_out & ~dataset.good)
        )
    )


def _large_first(order: Index, dataset: Dataset) -> Index:
    """The groups with those in front that hold more than LARGE_GROUP of the good parts; the others as they were."""
    counts = np.bincount(dataset.groups[dataset.good])
    is_large = counts[order] > LARGE_GROUP * counts.sum()
    return np.concatenate([order[is_large], order[~is_large]]) if len(order) > 1 / LARGE_GROUP else order
