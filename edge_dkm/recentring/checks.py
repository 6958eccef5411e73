"""What a new codebook must pass before a station uses it: clear images keep their cluster, and the edge holds on the newest parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_dkm.calibration import Calibration
from edge_dkm.head import to_cluster_space
from edge_dkm.recentring.interval import false_reject_interval
from edge_dkm.recentring.refusal import RefusedError
from edge_dkm.recentring.reservoir import Rows
from edge_dkm.recentring.scoring import Floats, Ids, Space, nearest, raw_score
from edge_dkm.recentring.shares import Mask

MIN_AGREEMENT = 0.95


@dataclass(frozen=True)
class GoldenParts:
    """Embeddings (G, D) of the golden images of parts whose margin is clear under the base codebook, and their ids (G,) there."""

    embedding: Floats
    ids: Ids


@dataclass(frozen=True)
class HeldOut:
    """Of the `groups` newest groups one part each: how many the new codebook calls novel; `before`: how many the running one did.

    `low` to `high`: what chance explains, by the share beyond the edge among the calibration's groups. Novel parts are in both counts:
    without them a change would hide, since the running codebook has just taken it out.
    """

    groups: int
    flagged: int
    low: int
    high: int
    before: int

    @property
    def is_inside(self) -> bool:
        """Whether chance explains the number."""
        return self.low <= self.flagged <= self.high

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return dict(self.__dict__)

    def problem(self) -> str:
        """For people."""
        return (
            f"the new codebook calls {self.flagged} of the newest {self.groups} parts novel, expected {self.low} to {self.high}: the parts "
            f"of this time are not all of one kind, so something changed meanwhile; wait for more parts, or take the newer ones alone (--hours)"
        )


def check_held_out(
    rows: Rows, good: Mask, share: Mask, tensors: Mapping[str, Floats], space: Space, calibration: Calibration
) -> HeldOut:
    """One part per group, its first (its strangest, where groups are judged by that), against the calibration's beta-binomial interval."""
    every = rows.where(share)
    _, s = raw_score(every.embedding, every.patch_score, tensors, space.l2)
    _, first, index = np.unique(every.group, return_index=True, return_inverse=True)
    is_flagged, was_novel = s > np.float32(calibration.scale), ~good[share]
    if calibration.unit == "group":
        flagged, before = (len(np.unique(index[mask])) for mask in (is_flagged, was_novel))
    else:
        flagged, before = (int(mask[first].sum()) for mask in (is_flagged, was_novel))
    low, high = false_reject_interval(
        calibration.beyond + 1, max(calibration.seen - calibration.beyond, 1.0), len(first)
    )
    return HeldOut(len(first), flagged, low, high, before)


def check_golden(
    golden: GoldenParts,
    tensors: Mapping[str, Floats],
    running: Mapping[str, Floats],
    space: Space,
    figures: dict[str, Any],
) -> dict[str, Any]:
    """The golden images' ids under the new codebook against those of the base one.

    Raises:
        RefusedError: fewer than MIN_AGREEMENT of them agree, or a cluster has lost the majority of its own.
    """
    z = to_cluster_space(golden.embedding, space.l2)
    agrees = nearest(z, tensors["centroids"]) == golden.ids
    lost = [int(k) for k in np.unique(golden.ids) if 2 * agrees[golden.ids == k].sum() < (golden.ids == k).sum()]
    found = {"compared": len(agrees), "agreed": int(agrees.sum()), "lost_clusters": lost}
    if lost or agrees.mean() < MIN_AGREEMENT:
        already = nearest(z, running["centroids"]) == golden.ids
        raise RefusedError(
            "golden",
            f"{int(agrees.sum())} of {len(agrees)} golden images keep their cluster, expected {MIN_AGREEMENT:.0%}"
            f"{f'; clusters {lost} would become others' if lost else ''} ({int(already.sum())} keep it under the running codebook): "
            f"the parts have changed more than a new codebook can follow; train again with frames of today",
            "retrain",
            figures | {"golden": found},
        )
    return found
