"""From a station's recent parts to a new codebook, or to the reason why there is none. Pure: no disk, no model.

rows --novel or rejected: out--> groups --> .6 centres   mini-batch k-means from the running centroids
                                        |-> .1 radii     medians, shrunk to the pooled one
                                        |-> .3 calibration; a novel part beyond the new edge counts as above it
                                        '-> the newest .1 of all groups: does the edge hold on them?
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edge_dkm.calibration import Calibration, Known, Novel, calibrate
from edge_dkm.head import to_cluster_space
from edge_dkm.recentring.checks import GoldenParts, HeldOut, check_golden, check_held_out
from edge_dkm.recentring.kmeans import MIN_MEMBERS, means, recentred
from edge_dkm.recentring.refusal import RefusedError
from edge_dkm.recentring.reservoir import Rows
from edge_dkm.recentring.scoring import Floats, Ids, Space, novelty_distance, raw_score
from edge_dkm.recentring.shares import Mask, Shares, deal

MIN_GROUPS = 40  # of parts that were let through: below, neither medians nor the check say anything
MAX_EXCLUDED = 3.0  # times the target rate
SHRINK_PARTS, RADIUS_FLOOR = 10, 1e-6  # as trainer/novelty.py
SAME = 2.0**-9  # relative: float16 keeps 11 bits, so parts that differ by less are the same


@dataclass(frozen=True)
class Options:
    """`target_frr`: the rate to promise. `rejected`: clusters whose parts are no good parts."""

    target_frr: float
    unit: Literal["part", "group"] = "part"
    rejected: frozenset[int] = frozenset()
    seed: int = 0


@dataclass(frozen=True)
class Proposal:
    """A codebook that passed its checks. `figures` says how it came about."""

    tensors: Mapping[str, Floats]
    calibration: Calibration
    figures: dict[str, Any]


def recentre(
    rows: Rows,
    running: Mapping[str, Floats],
    space: Space,
    options: Options,
    golden: GoldenParts | None = None,
    base: Mapping[str, Floats] | None = None,
) -> Proposal:
    """The codebook that follows from the rows and the running one.

    Args:
        golden: what the graph answers to its golden images; without them there is no such check.
        base: the graph's own codebook, whose edge holds where the rows cannot prove another; None: the running one is that.

    Raises:
        RefusedError: too few or too many novel parts, parts that are all the same, or a check that failed.
    """
    is_rejected = rows.is_rejected | np.isin(rows.cluster, sorted(options.rejected))
    is_novel = rows.is_novel & ~is_rejected
    figures = _excluded(rows, is_novel, is_rejected, options)
    is_good = ~is_novel & ~is_rejected
    _check_enough(rows, is_good, options, figures)
    rng = np.random.default_rng(options.seed)
    shares = deal(rows.where(~is_rejected), rng)
    candidates, good = rows.where(~is_rejected), is_good[~is_rejected]
    _check_shares(shares, good, figures)
    centred = _centred(candidates.where(shares.centre & good), running, space, rng)
    _set_radii(centred, candidates.where(shares.radius & good), running, space)
    scored = _scored(candidates, good, shares.calibration, centred, space)
    calibration = scored.calibrated(base or running, centred, options)
    tensors = {**centred, **calibration.tensors()}
    held_out = check_held_out(candidates, good, shares.check, tensors, space, calibration)
    figures |= {
        "used": _counts(candidates, good, shares),
        "groups": calibration.groups,
        "novel_above": round(calibration.above / calibration.total, 6),
        "target_frr": options.target_frr,
        "promised_frr": round(calibration.promised_frr, 6),
        "edge": "training" if calibration.is_held else "measured",
        "held_out": held_out.plain(),
        **_movement(tensors, running, candidates.where(shares.centre & good), space),
    }
    if not held_out.is_inside:
        raise RefusedError("false_rejects", held_out.problem(), "wait", figures)
    if golden is not None:
        figures["golden"] = check_golden(golden, tensors, running, space, figures)
    return Proposal(tensors, calibration, figures)


def _excluded(rows: Rows, is_novel: Mask, is_rejected: Mask, options: Options) -> dict[str, Any]:
    """The share of what is left out, each group counting once; refuses where it is too large.

    Raises:
        RefusedError: there are no parts, or too many of them were novel or rejected.
    """
    if len(rows) == 0:
        raise RefusedError(
            "no_rows", "the station has kept no parts of this camera and model yet; let it inspect some first", "wait"
        )
    _, index, counts = np.unique(rows.group, return_inverse=True, return_counts=True)
    weight = 1.0 / counts[index]
    novel, rejected = (float(weight[mask].sum() / weight.sum()) for mask in (is_novel, is_rejected))
    limit = MAX_EXCLUDED * options.target_frr
    figures = {
        "rows": len(rows),
        "novel_share": round(novel, 6),
        "rejected_share": round(rejected, 6),
        "excluded_limit": round(limit, 6),
    }
    if novel + rejected > limit:
        raise RefusedError(
            "too_many_novel",
            f"{novel:.1%} of the recent parts were novel and {rejected:.1%} rejected, expected at most {limit:.1%} in all "
            f"(three times the target): a codebook made of what is left would not know what became of them; look at light, focus "
            f"and position of the camera first, then at the parts",
            "camera",
            figures,
        )
    return figures


def _check_enough(rows: Rows, is_good: Mask, options: Options, figures: dict[str, Any]) -> None:
    good = rows.where(is_good)
    n_groups = len(np.unique(good.group))
    if n_groups < MIN_GROUPS:
        needed = int(np.ceil((1 / options.target_frr - 1) / (0.9 * 0.3)))
        raise RefusedError(
            "too_few",
            f"{len(good)} good parts of {n_groups} groups were kept, expected at least {MIN_GROUPS} groups "
            f"({max(needed, MIN_GROUPS)} to promise {options.target_frr:.2%}); let the station run longer",
            "wait",
            figures,
        )


def _check_shares(shares: Shares, good: Mask, figures: dict[str, Any]) -> None:
    """Where the target lets most parts be novel, all that are dealt to one purpose may be."""
    if not all((share & good).any() for share in (shares.centre, shares.radius, shares.calibration)):
        raise RefusedError(
            "too_few",
            "no good part is left for centres, radii or calibration, since most parts were novel; let the station run longer",
            "wait",
            figures,
        )


def _centred(rows: Rows, running: Mapping[str, Floats], space: Space, rng: np.random.Generator) -> dict[str, Floats]:
    """`centroids` in cluster space and `cluster_mean` before any L2."""
    centroids, ids = recentred(to_cluster_space(rows.embedding, space.l2), running["centroids"], rng)
    return {"centroids": centroids, "cluster_mean": means(rows.embedding, ids, running["cluster_mean"])}


def _set_radii(centred: dict[str, Floats], rows: Rows, running: Mapping[str, Floats], space: Space) -> None:
    """Medians of the novelty distance, as trainer/novelty.py `radii`; a cluster without parts keeps its own, not the pooled one.

    Raises:
        RefusedError: the parts are all the same.
    """
    ones = np.ones(space.n_clusters, np.float32)
    ids, _ = raw_score(rows.embedding, rows.patch_score, {**centred, "cluster_radius": ones}, space.l2)
    distance = novelty_distance(rows.embedding, centred["cluster_mean"], ids)
    if float(np.median(distance)) <= SAME * float(np.abs(rows.embedding).max()):
        raise RefusedError(
            "identical",
            f"of {len(rows)} good parts half or more are the same picture: no radius can be learned from them; is the camera "
            f"frozen, or does the ROI show no part?",
            "camera",
        )
    centred["cluster_radius"] = radii(distance, ids, running["cluster_radius"])


def radii(distance: Floats, ids: Ids, running: Floats) -> Floats:
    """(K,) from the novelty distances (N,) of N parts, at least one, in the clusters `ids`."""
    pooled = float(np.median(distance))
    values = running.astype(np.float64)
    for k in np.unique(ids):
        members = distance[ids == k]
        values[k] = (len(members) * float(np.median(members)) + SHRINK_PARTS * pooled) / (len(members) + SHRINK_PARTS)
    return np.maximum(values, RADIUS_FLOOR).astype(np.float32)


@dataclass(frozen=True)
class _Scored:
    """The calibration's share under the new centres and radii: of parts let through (M,) and novel ones (E,)."""

    good: Rows
    ids: Ids
    s: Floats
    novel: Novel

    def calibrated(self, base: Mapping[str, Floats], centred: Mapping[str, Floats], options: Options) -> Calibration:
        """The edge of the training is a distance: in new radii it is another number, but for parts whose patches decide."""
        ratio = (base["cluster_radius"] / centred["cluster_radius"])[self.ids]
        decided_by_patches = self.s <= self.good.patch_score  # never where that is NaN
        held = float(base["novelty_scale"][0]) * float(np.median(np.where(decided_by_patches, 1.0, ratio)))
        known = Known(self.novel, held)
        return calibrate(self.s, self.good.group, options.target_frr, unit=options.unit, known=known)


def _scored(rows: Rows, good: Mask, share: Mask, codebook: Mapping[str, Floats], space: Space) -> _Scored:
    chosen, left_out = rows.where(share & good), rows.where(share & ~good)
    ids, s = raw_score(chosen.embedding, chosen.patch_score, codebook, space.l2)
    _, of_novel = raw_score(left_out.embedding, left_out.patch_score, codebook, space.l2)
    return _Scored(chosen, ids, s, Novel(of_novel, left_out.group))


def _counts(rows: Rows, good: Mask, shares: Shares) -> dict[str, int]:
    return {name: int((getattr(shares, name) & good).sum()) for name in ("centre", "radius", "calibration", "check")}


def _movement(tensors: Mapping[str, Floats], running: Mapping[str, Floats], rows: Rows, space: Space) -> dict[str, Any]:
    """How far each mean moved, in its running radius; and the clusters that had too few parts and stayed."""
    apart = np.sqrt(np.square(tensors["cluster_mean"] - running["cluster_mean"]).sum(1)) / running["cluster_radius"]
    ids, _ = raw_score(rows.embedding, rows.patch_score, tensors, space.l2)
    counts = np.bincount(ids, minlength=space.n_clusters)
    return {
        "moved_radii": [round(float(x), 4) for x in apart],
        "kept_clusters": [int(k) for k in np.flatnonzero(counts < MIN_MEMBERS)],
    }


__all__ = ["HeldOut", "Options", "Proposal", "recentre"]
