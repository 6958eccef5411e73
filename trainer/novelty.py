"""The one definition of novelty: raw score, calibration to a target false-reject rate, p-value. Exported as it stands here.

    novelty distance = ||z - cluster_mean[nearest]||        before any L2
    raw score s      = novelty distance / radius[nearest]       where there is a bank: max of that and patch_score
    novelty_score    = s / novelty_scale                    1.0 = the edge at the target rate, higher = stranger

Parts of one group (several shots of one part, one lot) are not exchangeable, so a group counts once: each of its parts weighs
1 / (parts in the group). With G groups, `novelty_scale` is the smallest calibration s whose cumulative weight reaches
(1 - alpha)(G + 1). Then P(score of one part of a new group > 1) <= alpha, if groups are exchangeable and so are the parts inside
a group; the probability is over groups, calibration ones included: Lee, Barber and Willett, "Distribution-free inference with
hierarchical data", 2023, arXiv 2306.06342, Theorem 1 (HCP); Dunn, Wasserman and Ramdas 2022, arXiv 1809.07441. With one part per
group it is split conformal prediction (Vovk et al. 2005).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from configs import Settings
from trainer.bank.settings import BankSettings
from trainer.splits import Shares

SHRINK_PARTS = 10  # a cluster's median radius counts as n parts against 10 parts of the pooled one
RADIUS_FLOOR = 1e-6  # all images of a cluster alike: a radius of 0 would divide by zero


class NoveltySettings(Settings):
    """`target_frr`: the share of good parts that may be called novel. `unit: group` judges a group by its strangest part (stricter).

    `bank`: a bank of patches beside the embedding; `auto` lets fit choose one, on synthetic defects.
    """

    target_frr: float = Field(0.01, gt=0, lt=1)
    unit: Literal["part", "group"] = "part"
    bank: BankSettings | Literal["auto"] | None = None
    shares: Shares = Shares()


def novelty_distance(z: Tensor, cluster_mean: Tensor, ids: Tensor) -> Tensor:
    """(B,) distance of z (B, D), before L2, to the mean of its cluster."""
    return torch.linalg.vector_norm(z - cluster_mean.index_select(0, ids), dim=-1)


def raw_score(distance: Tensor, cluster_radius: Tensor, ids: Tensor, patch_score: Tensor | None = None) -> Tensor:
    """S (B,): the novelty distance in radii of the cluster, or the bank's `patch_score` (B,) where that is higher."""
    s = distance / cluster_radius.index_select(0, ids)
    return s if patch_score is None else torch.maximum(s, patch_score)


def p_value(s: Tensor, calibration: Tensor, weight: Tensor) -> Tensor:
    """(B,) share of good parts at least as strange: (1 + sum of weights with s_i >= s) / (G + 1)."""
    at_least = (calibration >= s[:, None]).to(s.dtype)  # (B, M)
    return (1 + at_least @ weight) / (1 + weight.sum())


def radii(distance: Tensor, ids: Tensor, n_clusters: int) -> Tensor:
    """(K,) median novelty distance per cluster, shrunk towards the pooled median where a cluster has few parts."""
    pooled = distance.quantile(0.5)
    values = []
    for k in range(n_clusters):
        members = distance[ids == k]
        own = members.quantile(0.5) if len(members) else pooled
        values.append((len(members) * own + SHRINK_PARTS * pooled) / (len(members) + SHRINK_PARTS))
    return torch.stack(values).clamp_min(RADIUS_FLOOR)


@dataclass(frozen=True)
class Calibration:
    """`scores` (M,) sorted with their `weights` (M,); `scale` is the edge; `promised_frr` >= the target where groups are too few.

    `parts` counts what was calibrated on; M is that, or `groups` with `unit: group`.
    """

    scores: NDArray[np.float32]
    weights: NDArray[np.float32]
    scale: float
    groups: int
    parts: int
    target_frr: float
    promised_frr: float

    @property
    def is_weaker_than_asked(self) -> bool:
        """Whether too few groups forced a higher rate than the target."""
        return self.promised_frr > self.target_frr


def calibrate(s: NDArray[np.float32], groups: NDArray[np.int64], settings: NoveltySettings) -> Calibration:
    """The edge for the target rate from raw scores s (M,) of held-out good parts and their groups (M,)."""
    n_parts = len(s)
    if settings.unit == "group":
        unique, index = np.unique(groups, return_inverse=True)
        strangest = np.full(len(unique), -np.inf, np.float32)
        np.maximum.at(strangest, index, s)
        s, groups = strangest, unique
    _, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    n_groups = len(counts)
    weights = 1.0 / counts[index]
    order = np.argsort(s, kind="stable")
    s, weights = s[order], weights[order]
    # (1 - alpha)(G + 1) <= G has no solution below 1 / (G + 1): that is the smallest rate that G groups can promise.
    promised = max(settings.target_frr, 1.0 / (n_groups + 1))
    needed = (1 - promised) * (n_groups + 1)
    reached = np.cumsum(weights) >= needed - 1e-9
    scale = float(s[int(np.argmax(reached))]) if reached.any() else float(s[-1])
    return Calibration(
        s.astype(np.float32),
        weights.astype(np.float32),
        max(scale, RADIUS_FLOOR),
        n_groups,
        n_parts,
        settings.target_frr,
        promised,
    )


def groups_needed(target_frr: float) -> int:
    """The number of groups from which on `target_frr` can be promised."""
    return math.ceil(1 / target_frr) - 1
