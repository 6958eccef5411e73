"""The edge at a target false-reject rate, in numpy: what `dkm-train fit` computes in the trainer, for a station that is recentred.

A group counts once: each of its parts weighs 1 / (parts in the group). With G groups the edge is the smallest score whose cumulative
weight reaches (1 - alpha)(G + 1); below 1 / (G + 1) no rate can be promised (Lee, Barber and Willett, "Distribution-free inference with
hierarchical data", 2023, arXiv 2306.06342; one part per group: Vovk et al. 2005).

A station knows something the trainer does not: parts that the running codebook called novel. They are no calibration parts, since among
them are the defects; but some were good, and a sample without its own tail gives too low an edge. (At a target of 5 % the edge of the
parts that were let through would reject 5 % more of the good ones, every night again: the gate would close.) So each of them that
lies beyond the new edge, too, counts as a good part above it; what the new edge lets in counts for nothing. With A the weight let
through and E(t) that of the novel ones beyond t, the edge is the smallest score t of a part that was let through with

    A(<= t) >= (1 - alpha)(A + E(t) + 1)

which is the largest rate over all ways in which some of the novel parts may have been good, so the promise needs no guess how many
were. Where no such score exists (defects among the novel parts use up alpha), or the groups are too few to measure an edge again and
again (its noise would add up: once too low, the edge can only be raised by parts that it calls novel), the edge of the training holds,
`held`, and what the station's own parts prove of it is said. So no edge is ever wider than the parts let through or the training made
it, and it does not wander. What this cannot see: a defect that was let through is a calibration part like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]
Groups = NDArray[np.integer]
Unit = Literal["part", "group"]

FLOOR = 1e-6  # an edge of 0 would divide by zero
MIN_BEYOND = 10  # groups expected beyond an edge that is measured anew: then its rate is within some 30 % of the target
BEYOND = float(np.finfo(np.float32).max)  # stands for "above every edge" in a file whose values must be finite


@dataclass(frozen=True)
class Novel:
    """Raw scores (E,) and groups (E,) of the parts that were called novel; a group may have parts of both kinds."""

    s: Scores
    groups: Groups


@dataclass(frozen=True)
class Known:
    """What a station knows besides: its novel parts, and the edge of the training in its own new radii."""

    novel: Novel
    held: float


@dataclass(frozen=True)
class Calibration:
    """`scores` (M,) ascending with their `weights` (M,); `scale` is the edge. `above`: weight of the novel parts beyond it.

    `groups` counts those of the calibration parts, `total` is their weight and that above, `seen` that of all parts, novel ones
    included. `is_held`: the edge is that of the training. `promised_frr` is the target, or more where the groups are too few or too many novel parts lie above.
    """

    scores: Scores
    weights: Scores
    scale: float
    groups: int
    parts: int
    total: float
    seen: float
    above: float
    target_frr: float
    promised_frr: float
    unit: Unit
    is_held: bool

    @property
    def is_weaker_than_asked(self) -> bool:
        """Whether a higher rate than the target had to be promised."""
        return self.promised_frr > self.target_frr

    @property
    def beyond(self) -> float:
        """The weight of all parts beyond the edge, novel or not."""
        return float(self.weights[self.scores > np.float32(self.scale)].sum()) + self.above

    def tensors(self) -> dict[str, Scores]:
        """`novelty_scale`, `calibration` and `calibration_weight` of a codebook; the weight above is one entry that no score exceeds."""
        scores, weights = self.scores, self.weights
        if self.above > 0:
            scores, weights = np.append(scores, BEYOND), np.append(weights, self.above)
        return {
            "novelty_scale": np.array([self.scale], np.float32),
            "calibration": np.asarray(scores, np.float32),
            "calibration_weight": np.asarray(weights, np.float32),
        }


def calibrate(
    s: Scores, groups: Groups, target_frr: float, *, unit: Unit = "part", known: Known | None = None
) -> Calibration:
    """The edge from raw scores s (M,) of held-out parts that were let through, at least one, and their groups (M,).

    Args:
        unit: `group` judges a group by its strangest part.
        known: of a station; without it, this is the trainer's calibration.
    """
    n_parts, n_groups = len(s), len(np.unique(groups))
    novel = known.novel if known is not None else Novel(np.zeros(0, np.float32), groups[:0])
    if unit == "group":
        s, groups, novel = _strangest(s, groups, novel)
    names, index, counts = np.unique(np.concatenate([groups, novel.groups]), return_inverse=True, return_counts=True)
    every = 1.0 / counts[index]
    order = np.argsort(s, kind="stable")
    s, weights = s[order], every[: len(s)][order]
    # At any edge: the weight of the novel parts at or below it, and by that what counts in all.
    by_score = np.argsort(novel.s, kind="stable")
    reached_novel = np.concatenate([[0.0], np.cumsum(every[len(s) :][by_score])])
    inside = reached_novel[np.searchsorted(novel.s[by_score], s, side="right")]
    total = len(names) - inside
    is_reached = np.cumsum(weights) >= (1 - target_frr) * (total + 1) - 1e-9
    at = int(np.argmax(is_reached)) if is_reached.any() else len(s) - 1
    scale, promised = float(s[at]), target_frr
    is_held = known is not None and (not is_reached.any() or target_frr * len(names) < MIN_BEYOND)
    if known is not None and is_held:
        scale = known.held
    let_in = float(reached_novel[np.searchsorted(novel.s[by_score], np.float32(scale), side="right")])
    above, counted = max(0.0, float(reached_novel[-1]) - let_in), len(names) - let_in
    if is_held or not is_reached.any():
        beyond = float(weights[s > np.float32(scale)].sum())
        promised = max(target_frr, (1.0 + beyond + above) / (counted + 1))
    return Calibration(
        s.astype(np.float32),
        weights.astype(np.float32),
        max(scale, FLOOR),
        n_groups,
        n_parts,
        counted,
        float(len(names)),
        above,
        target_frr,
        promised,
        unit,
        is_held,
    )


def _strangest(s: Scores, groups: Groups, novel: Novel) -> tuple[Scores, Groups, Novel]:
    """One score per group; one with a novel part is a novel group, unless all are: then that part alone is left out."""
    if np.isin(groups, novel.groups).all():
        return s, groups, novel
    every, all_s = np.concatenate([groups, novel.groups]), np.concatenate([s, novel.s])
    unique, index = np.unique(every, return_inverse=True)
    strangest = np.full(len(unique), -np.inf, np.float32)
    np.maximum.at(strangest, index, all_s)
    is_novel = np.isin(unique, novel.groups)
    return strangest[~is_novel], unique[~is_novel], Novel(strangest[is_novel], unique[is_novel])
