"""Whether a quantised graph may stand in for the fp32 one: the same ids, the same ranking, the promised rate, and really faster.

Both run on frames of the run's own images that neither training nor the quantiser's ranges have seen.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy.stats import betabinom, spearmanr

from edge_dkm.contract import IMAGE
from edge_dkm.inspector import Inspector
from exporters.probe import Probe

Image = NDArray[np.uint8]
MIN_AGREEMENT, MIN_CLUSTER_AGREEMENT, MIN_SPEARMAN = 0.995, 0.98, 0.99
MIN_SPEED = 1.05  # below that the clock's own spread decides
ROUNDS, WARM_UP = 40, 5
INTERVAL = 0.95


@dataclass(frozen=True)
class HeldOut:
    """One frame (H, W, 3) uint8 BGR; `group` and `is_good` as the run's calibration has them."""

    image: Image
    group: int
    is_good: bool


@dataclass(frozen=True)
class GateReport:
    """`cluster_agreement`: of the worst cluster, whose id is `worst_cluster`. `frr`: of the quantised graph, inside `frr_interval` or None.

    `speed`: time of fp32 / time of int8, the median of paired runs on this machine.
    """

    frames: int
    agreement: float
    cluster_agreement: float
    worst_cluster: int
    spearman: float
    frr: float | None
    frr_interval: tuple[float, float] | None
    speed: float

    @property
    def reasons(self) -> list[str]:
        """Why the quantised graph is not written; empty where it may be."""
        found = []
        if self.agreement < MIN_AGREEMENT:
            found.append(
                f"ids agree on {self.agreement:.2%} of {self.frames} held-out frames, expected {MIN_AGREEMENT:.1%}"
            )
        if self.cluster_agreement < MIN_CLUSTER_AGREEMENT:
            found.append(
                f"ids agree on {self.cluster_agreement:.2%} of cluster {self.worst_cluster}, expected {MIN_CLUSTER_AGREEMENT:.0%}"
            )
        if not self.spearman >= MIN_SPEARMAN:
            found.append(f"novelty scores correlate by {self.spearman:.4f} (Spearman), expected {MIN_SPEARMAN}")
        if self.frr is not None and self.frr_interval is not None:
            low, high = self.frr_interval
            if not low <= self.frr <= high:
                found.append(
                    f"its false-reject rate on held-out good parts is {self.frr:.2%}, expected {low:.2%} to {high:.2%}"
                )
        if self.speed < MIN_SPEED:
            found.append(f"it is {self.speed:.2f} times as fast as fp32 on this machine, expected {MIN_SPEED} or more")
        return found

    def plain(self) -> dict[str, Any]:
        """For `dkm.quantization`."""
        return {
            "frames": self.frames,
            "id_agreement": round(self.agreement, 5),
            "worst_cluster_agreement": round(self.cluster_agreement, 5),
            "spearman": round(self.spearman, 5),
            "frr": None if self.frr is None else round(self.frr, 5),
            "speed": round(self.speed, 2),
        }


@dataclass(frozen=True)
class Promise:
    """The calibration that both graphs carry: target rate and number of groups it was taken from."""

    target_frr: float
    groups: int


def judge(fp32: Inspector, int8: Inspector, frames: Sequence[HeldOut], promise: Promise | None) -> GateReport:
    """Runs both graphs on all frames.

    Args:
        promise: None where novelty is not calibrated; then no rate is compared.
    """
    found = [[_answer(graph, frame.image) for graph in (fp32, int8)] for frame in frames]
    ids = np.array([[answer[0] for answer in row] for row in found])  # (n, 2)
    scores = np.array([[answer[1] for answer in row] for row in found])
    same = ids[:, 0] == ids[:, 1]
    by_cluster = {int(k): float(same[ids[:, 0] == k].mean()) for k in np.unique(ids[:, 0])}
    worst = min(by_cluster, key=lambda k: by_cluster[k])
    good = [n for n, frame in enumerate(frames) if frame.is_good]
    frr, interval = _false_rejects(scores[good, 1], [frames[n].group for n in good], promise)
    return GateReport(
        len(frames),
        float(same.mean()),
        by_cluster[worst],
        worst,
        _spearman(scores),
        frr,
        interval,
        _speed(fp32, int8, [frame.image for frame in frames[:8]]),
    )


def _answer(inspector: Inspector, image: Image) -> tuple[int, float]:
    outputs = inspector.run(image[None], ("cluster_id", "novelty_score"), overrides={})
    return int(outputs["cluster_id"][0]), float(outputs["novelty_score"][0])


def _spearman(scores: NDArray[np.float64]) -> float:
    if (scores == scores[0]).all():
        return 1.0  # nothing to rank
    return float(spearmanr(scores[:, 0], scores[:, 1]).statistic)


def _false_rejects(
    scores: NDArray[np.float64], groups: Sequence[int], promise: Promise | None
) -> tuple[float | None, tuple[float, float] | None]:
    """Rate over groups (each counts once), and where it lies with probability INTERVAL if the promise holds.

    With G calibration groups the rate is Beta distributed around its target (split conformal prediction), so the number of rejects
    among n new groups is beta-binomial.
    """
    if promise is None or not len(groups):
        return None, None
    unique, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    weight = 1.0 / counts[index]
    rate = float((weight * (scores > 1.0)).sum() / len(unique))
    above = max(1, int(np.floor(promise.target_frr * (promise.groups + 1))))
    law = betabinom(len(unique), above, promise.groups + 1 - above)
    low, high = law.interval(INTERVAL)
    return rate, (float(low) / len(unique), float(high) / len(unique))


def _speed(fp32: Inspector, int8: Inspector, images: Sequence[Image]) -> float:
    """Median over pairs that ran next to each other, so that a busy machine slows both."""
    ratios = []
    for n in range(ROUNDS + WARM_UP):
        image = images[n % len(images)]
        slow, fast = _seconds(fp32, image), _seconds(int8, image)
        if n >= WARM_UP:
            ratios.append(slow / fast)
    return float(np.median(ratios))


def _seconds(inspector: Inspector, image: Image) -> float:
    started = time.perf_counter()
    inspector.run(image[None], ("cluster_id", "novelty_score"))
    return time.perf_counter() - started


def execution_spread(model: onnx.ModelProto, images: Iterable[Image]) -> float:
    """The largest difference of scores and distances, relative to max(1, value), between two right ways of running a quantised graph.

    One fuses whole layers into integer kernels, the other runs every node by itself: roundings fall apart, as between two devices.
    """
    names = ("novelty_score", "distances")
    fused, plain = Probe(model, names), Probe(model, names, optimise=False)
    worst = 0.0
    for image in images:
        a, b = fused({IMAGE: image[None]}), plain({IMAGE: image[None]})
        for name in names:
            x, y = np.asarray(a[name], np.float64), np.asarray(b[name], np.float64)
            worst = max(worst, float((np.abs(x - y) / np.maximum(1.0, np.abs(x))).max()))
    return worst
