"""Whether a quantised graph may stand in for the fp32 one: the same ids, the same ranking, the promised rate, and really faster.

Both run on frames of the run's own images that neither training nor the quantiser's ranges have seen. (The calibration parts among them
did set `novelty_scale`, for fp32: there its own rate is the target, which stands beside that of int8.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy.stats import betabinom

from edge_dkm.contract import IMAGE
from edge_dkm.inspector import Inspector
from edge_dkm.lowered import MIN_AGREEMENT, MIN_SPEARMAN, spearman, speed_problem
from edge_dkm.paired_runs import paired_ms
from exporters.own_images import Image, OwnImage, pixels_of
from exporters.probe import Probe

MIN_CLUSTER_AGREEMENT = 0.98
PAIRS, WARM_UP = 30, 5
TIMED_IMAGES = 8
INTERVAL = 0.95


@dataclass(frozen=True)
class Promise:
    """What both graphs are calibrated to: the rate, from how many groups, judged by `part` or `group`, without `rejected` clusters."""

    target_frr: float
    groups: int
    unit: str = "part"
    rejected: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Rates:
    """False-reject rates of held-out good parts by both graphs, and where that of int8 has to lie."""

    fp32: float
    int8: float
    low: float
    high: float


@dataclass(frozen=True)
class GateReport:
    """`cluster_agreement`: per cluster id; clusters that no held-out frame shows are `unseen`. `score_gap`: the largest, relative to max(1, score).

    `speed`: time of fp32 / time of int8, the median of paired runs on this machine; `too_slow`: why that does not count as faster.
    """

    frames: int
    agreement: float
    cluster_agreement: dict[int, float]
    unseen: tuple[int, ...]
    spearman: float
    score_gap: float
    rates: Rates | None
    speed: float
    too_slow: str | None

    @property
    def worst_cluster(self) -> int:
        """The id of the cluster that agrees least."""
        return min(self.cluster_agreement, key=lambda k: self.cluster_agreement[k])

    @property
    def reasons(self) -> list[str]:
        """Why the quantised graph is not written; empty where it may be."""
        found = []
        if self.agreement < MIN_AGREEMENT:
            found.append(
                f"ids agree on {self.agreement:.2%} of {self.frames} held-out frames, expected {MIN_AGREEMENT:.1%}"
            )
        worst = self.cluster_agreement[self.worst_cluster]
        if worst < MIN_CLUSTER_AGREEMENT:
            found.append(
                f"ids agree on {worst:.2%} of cluster {self.worst_cluster}, expected {MIN_CLUSTER_AGREEMENT:.0%}"
            )
        if self.unseen:
            found.append(
                f"no held-out frame shows the clusters {', '.join(map(str, self.unseen))}: they cannot be judged"
            )
        if not self.spearman >= MIN_SPEARMAN:
            found.append(f"novelty scores correlate by {self.spearman:.4f} (Spearman), expected {MIN_SPEARMAN}")
        rates = self.rates
        if rates is not None and not rates.low <= rates.int8 <= rates.high:
            found.append(
                f"its false-reject rate on held-out good parts is {rates.int8:.2%} (fp32: {rates.fp32:.2%}), "
                f"expected {rates.low:.2%} to {rates.high:.2%}"
            )
        return [*found, *([self.too_slow] if self.too_slow else [])]

    def plain(self) -> dict[str, Any]:
        """For `dkm.quantization`."""
        return {
            "frames": self.frames,
            "id_agreement": round(self.agreement, 5),
            "worst_cluster_agreement": round(self.cluster_agreement[self.worst_cluster], 5),
            "spearman": round(self.spearman, 5),
            "score_gap": round(self.score_gap, 5),
            "frr": None if self.rates is None else round(self.rates.int8, 5),
            "frr_fp32": None if self.rates is None else round(self.rates.fp32, 5),
            "speed": round(self.speed, 3),
        }


def judge(fp32: Inspector, int8: Inspector, frames: Sequence[OwnImage], promise: Promise | None) -> GateReport:
    """Runs both graphs on all frames.

    Args:
        promise: None where novelty is not calibrated; then no rate is compared.
    """
    answers = [[_answer(graph, pixels) for graph in (fp32, int8)] for pixels in pixels_of(frames)]
    ids = np.array([[answer[0] for answer in row] for row in answers])  # (n, 2)
    scores = np.array([[answer[1] for answer in row] for row in answers])
    same = ids[:, 0] == ids[:, 1]
    clusters = [c.id for c in fp32.metadata.clusters if c.n > 0]
    fp32_ms, int8_ms = _times_ms(fp32, int8, list(pixels_of(frames[:TIMED_IMAGES])))
    correlation = 1.0 if np.array_equal(scores[:, 0], scores[:, 1]) else spearman(scores[:, 0], scores[:, 1])
    return GateReport(
        len(frames),
        float(same.mean()),
        {int(k): float(same[ids[:, 0] == k].mean()) for k in np.unique(ids[:, 0])},
        tuple(k for k in clusters if not (ids[:, 0] == k).any()),
        0.0 if np.isnan(correlation) else correlation,
        float((np.abs(scores[:, 0] - scores[:, 1]) / np.maximum(1.0, np.abs(scores[:, 0]))).max()),
        false_rejects(scores, ids[:, 0], frames, promise),
        float(np.median(np.divide(fp32_ms, int8_ms))),
        speed_problem(int8_ms, fp32_ms),
    )


def _answer(inspector: Inspector, image: Image) -> tuple[int, float]:
    outputs = inspector.run(image[None], ("cluster_id", "novelty_score"), overrides={})
    return int(outputs["cluster_id"][0]), float(outputs["novelty_score"][0])


def false_rejects(
    scores: NDArray[np.float64], ids: NDArray[np.int64], frames: Sequence[OwnImage], promise: Promise | None
) -> Rates | None:
    """Rates over groups (each counts once), and where they lie with probability INTERVAL if the promise holds.

    With G calibration groups the rate is Beta distributed around its target (split conformal prediction), so the number of rejects
    among n new groups is beta-binomial. `scores` (n, 2): of fp32 and of int8; `ids` (n,): of fp32.
    """
    if promise is None:
        return None
    kept = [n for n, frame in enumerate(frames) if frame.is_good and int(ids[n]) not in promise.rejected]
    if not kept:
        return None
    unique, index, counts = np.unique([frames[n].group for n in kept], return_inverse=True, return_counts=True)
    is_novel = (scores[kept] > 1.0).astype(np.float64)  # (m, 2)
    per_group = np.zeros((len(unique), 2))
    if promise.unit == "group":
        np.maximum.at(per_group, index, is_novel)
    else:
        np.add.at(per_group, index, is_novel / counts[index][:, None])
    above = max(1, int(np.floor(promise.target_frr * (promise.groups + 1))))
    low, high = betabinom(len(unique), above, promise.groups + 1 - above).interval(INTERVAL)
    fp32, int8 = per_group.mean(0)
    return Rates(float(fp32), float(int8), float(low) / len(unique), float(high) / len(unique))


def _times_ms(fp32: Inspector, int8: Inspector, images: Sequence[Image]) -> tuple[list[float], list[float]]:
    """Of runs of both on the same images, next to each other, so that a busy machine slows both."""
    turns = {graph: itertools.cycle(images) for graph in (fp32, int8)}

    def run(graph: Inspector) -> None:
        graph.run(next(turns[graph])[None], ("cluster_id", "novelty_score"))

    times = paired_ms({graph: partial(run, graph) for graph in turns}, PAIRS, WARM_UP)
    return times[fp32], times[int8]


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
