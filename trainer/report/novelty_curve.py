"""The false-reject curve: which share of good parts a threshold would call novel, and between what a line may find itself. Drawn in report.html.

    k(t)        weight of the calibration scores <= t; every group weighs 1, as in trainer/novelty.py
    share(t)    (G - k) / G
    a line      its rate with the threshold at the calibration score t scatters like Beta(G + 1 - k, k): the share above an order statistic

The distribution is that of Vovk 2012, "Conditional validity of inductive conformal predictors", arXiv 1209.2673. It holds for one part per
group, and for groups whose parts are equal; where the parts of a group differ, lines scatter less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from trainer.model import ClusterModel
from trainer.report import chart

COVERED = 0.95
SHOWN = 3  # the axis ends at so many times the upper bound at the edge, since the edge is what one looks at
SAME = 1e-6  # relative: a float32 score divided by itself


@dataclass(frozen=True)
class FalseRejects:
    """At each different calibration score `threshold` (J,), rising, in units of the edge: `share` (J,) above it, and the band `low`, `high` (J,)."""

    threshold: NDArray[np.float64]
    share: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    groups: int

    def at(self, threshold: float) -> tuple[float, float, float]:
        """Share, low and high at the largest calibration score that is not above `threshold`; below all of them, every part is novel."""
        n = int(np.searchsorted(self.threshold, threshold * (1 + SAME), side="right")) - 1
        return (1.0, 1.0, 1.0) if n < 0 else (float(self.share[n]), float(self.low[n]), float(self.high[n]))


def false_rejects(scores: NDArray[np.floating[Any]], weights: NDArray[np.floating[Any]], scale: float) -> FalseRejects:
    """From raw calibration scores (M,), the weight of each (M,), one in all for a group, and the edge `scale`."""
    order = np.argsort(scores, kind="stable")
    s, w = scores[order].astype(np.float64), weights[order].astype(np.float64)
    groups = round(float(w.sum()))
    is_last = np.append(s[1:] > s[:-1], True)  # of those that are equal
    k = np.round(np.cumsum(w), 5)[is_last].clip(max=groups)  # rounded: float32 thirds do not sum to one
    tail = (1 - COVERED) / 2
    low, high = (beta.ppf(q, groups + 1 - k, k) for q in (tail, 1 - tail))
    return FalseRejects(s[is_last] / scale, (groups - k) / groups, np.asarray(low), np.asarray(high), groups)


def curve_of(model: ClusterModel) -> FalseRejects:
    """Of the parts that a model was calibrated on."""
    scores, weights = (t.cpu().numpy() for t in (model.calibration, model.calibration_weight))
    return false_rejects(scores, weights, float(model.novelty_scale))


def curve_section(curve: FalseRejects, novelty: dict[str, Any]) -> str:
    """HTML: the curve and how to read it. `novelty` is that of model.json, of a calibrated run."""
    share, low, high = curve.at(1.0)
    target, promised = novelty["target_frr"], novelty["promised_frr"]
    levels = {f"target {100 * target:.3g} %": target}
    if promised > target:
        levels[f"promised {100 * promised:.3g} %"] = promised
    top = min(1.0, max(SHOWN * high, 2 * promised))
    drawn = chart.Steps(curve.threshold, curve.share, curve.low, curve.high)
    what = "groups with a part" if novelty["unit"] == "group" else "good parts"
    return (
        f"<h3>False rejects</h3><p>The share of {what} above a threshold, on the {curve.groups} held-out groups of the calibration, each of which counts "
        f"once. At the edge it is {share:.2%}; a line that calibrates like this ends up between {low:.2%} and {high:.2%} in {COVERED:.0%} of "
        f"cases (the band; more groups narrow it), as long as its parts come from where these came from.</p>"
        f"{chart.steps(drawn, (1.0, 'edge'), levels, top, 'threshold on novelty_score')}"
    )
