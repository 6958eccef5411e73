"""Watches one camera for drift: feeds the tests, says what has moved and what to do about it.

A part's statistics in [0, 1] are averaged over a block of parts and tested twice: against the model's reference, from the first part on,
and against the line's own beginning, once that is known.

moved          light, focus, position: the picture's own measures left their interval. Less focus takes contrast with it, and burnt-out
               highlights sharpen edges, so light and focus are told apart by direction. new_type, new_family: more parts than before are
               novel, they are like one another, and the picture is as it was; new_type where they are a quarter of all, or more. new_family
               too where no more are novel, but crowd as none did (edge_dkm/drift/crowd.py).
recommended    camera     light, focus or position has moved, and the model sees the parts differently. Where it does not: none.
               retrain    novel parts keep coming while the others are as they were, alike (a new type or family) or not: recentring must
                          not learn them; or embeddings have moved beyond what the training parts scatter, or most parts are novel.
               recentre   embeddings, clusters or novelty have moved less than that, with the picture as it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_dkm.drift.baseline import Baseline
from edge_dkm.drift.crowd import CROWD, Crowd
from edge_dkm.drift.detector import MeanDetector
from edge_dkm.drift.novel_parts import MANY, NovelParts
from edge_dkm.drift.recent import Recent
from edge_dkm.drift.reference import Reference, is_event
from edge_dkm.drift.statistic import LEVELS, Sighting

LARGE_SHIFT = 1.0  # in the scatter of the reference
MOST = 0.5  # of the parts novel
LEAST_SHARE = 0.001  # of recent parts: smaller ones are not listed
HOLD_PARTS = 60  # the cause may show a little later than its effect: until then nothing but the camera is blamed
CROWD_HOLD_PARTS = 400  # a blurred camera's novel parts crowd too, and before the blur itself is sure
FEW = 0.05  # of all parts crowded: with fewer the others are as they were, however the line had moved before
SUPPORT = math.log(100)  # evidence that is enough to explain an alarm by, not to raise one
FAR_RANK = 0.05  # mean ranks this close to 0 or 1: beyond all that the reference or anything else explains

Moved = Literal["light", "focus", "position", "new_type", "new_family"]
Recommended = Literal["none", "camera", "recentre", "retrain"]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class DriftState:
    """What is said of a camera. n: parts seen with this model and codebook; shares of the clusters, novelty rate and shift of recent parts.

    shift: distance of the mean embedding from the reference's, in the reference's own scatter; None where it holds no embeddings.
    left: the statistics that have left their interval, as `light+` or `cluster-3-`. is_settled: whether the line's own beginning is known.
    """

    n: int
    shares: tuple[float, ...]
    novelty_rate: float
    shift: float | None
    moved: tuple[Moved, ...]
    recommended: Recommended
    left: tuple[str, ...]
    is_settled: bool

    @property
    def news(self) -> tuple[object, ...]:
        """What is worth a message at once when it changes."""
        return self.moved, self.recommended

    def plain(self) -> dict[str, object]:
        """As the message has it."""
        shares = {str(k): round(share, 4) for k, share in enumerate(self.shares) if share >= LEAST_SHARE}
        return {
            "n": self.n,
            "shares": shares,
            "novelty_rate": round(self.novelty_rate, 4),
            "shift": None if self.shift is None else round(self.shift, 4),
            "moved": list(self.moved),
            "recommended": self.recommended,
            "left": list(self.left),
            "settled": self.is_settled,
        }


class DriftMonitor:
    """See the module.

    Args:
        reference: of the model, or its `for_own_codebook`.
        n_clusters: K.
        false_alarm_every: parts to the first false alarm, on average and at least (assumptions: docs/novelty.md).
        run_in: so many parts are the line's own beginning.
    """

    def __init__(self, reference: Reference, n_clusters: int, false_alarm_every: float, run_in: int) -> None:
        self.reference, self._n_clusters, self._run_in = reference, n_clusters, run_in
        self._rare = np.array([is_event(name) for name in reference.names], bool)
        self._every = false_alarm_every / reference.block
        n_tests = 4 * len(reference.names) + 1  # two sides, against the reference and the beginning; and the crowd
        low, high = reference.interval()
        self._against_reference = MeanDetector(low, high, self._every, n_tests)
        everywhere = np.zeros_like(low), np.ones_like(high)
        self._against_beginning = MeanDetector(*everywhere, self._every, n_tests)
        self._baseline = Baseline(self._rare, run_in // reference.block)
        self._is_settled = False
        shape = 2, len(reference.names), 2
        self._left = np.zeros(shape, bool)  # test, statistic, below or above
        self._block: list[Vector] = []
        self._recent = Recent(len(reference.names))
        self._recent_shares, self._recent_novel = Recent(n_clusters), Recent(1)
        self._recent_mean: Recent | None = None
        self._novel = NovelParts()
        self._crowd = (
            None
            if reference.frame is None
            else Crowd(reference.frame.mean, reference.block, false_alarm_every, n_tests, run_in)
        )
        self._n = 0
        self._left_since: int | None = None  # part at which the first of those that are outside now has left

    def observe(self, sighting: Sighting, is_novel: bool) -> None:
        """One part, as the line judged it."""
        self._n += 1
        if is_novel:
            self._novel.add(sighting.novelty_score, sighting.embedding)
        share = np.zeros(self._n_clusters)
        share[sighting.cluster_id] = 1.0
        self._recent_shares.observe(share)
        self._recent_novel.observe(np.array([float(is_novel)]))
        if self.reference.frame is not None:
            self._recent_mean = self._recent_mean or Recent(len(sighting.embedding))
            self._recent_mean.observe(sighting.embedding.astype(np.float64))
        if not self.reference.names:
            return
        self._block.append(self.reference.observe(sighting))
        if len(self._block) == self.reference.block:
            self._test(_mean_of_known(np.array(self._block)))
            self._block = []
        if self._crowd is not None:
            self._crowd.observe(sighting.embedding, is_novel, is_beginning=not self._left[0].any())

    def _test(self, x: Vector) -> None:
        self._recent.observe(x, self.reference.block)
        detectors = self._against_reference, self._against_beginning
        for n, detector in enumerate(detectors):
            detector.observe(x)
            self._left[n] |= detector.alarms()
            if not self._left[n].any():
                continue
            over = self._is_back(detector) & self._left[n].any(axis=1)
            self._left[n, over] = False
            detector.forget(over)
        if not self._left.any():
            self._left_since = None
        elif self._left_since is None:
            self._left_since = self._n
        # What has drifted already is no beginning.
        if not self._left[0].any() and self._baseline.observe(x):
            self._against_beginning.bound(*self._baseline.interval())
            self._is_settled = True

    def _is_back(self, detector: MeanDetector) -> NDArray[np.bool_]:
        mean = self._recent.mean
        with np.errstate(invalid="ignore"):
            return np.asarray((mean >= detector.low) & (mean <= detector.high))

    @property
    def has_left(self) -> bool:
        """Whether any statistic is outside its interval."""
        return bool(self._left.any()) or self._has_crowd

    @property
    def _has_crowd(self) -> bool:
        return self._crowd is not None and self._crowd.left_for is not None

    def state(self) -> DriftState:
        """As of now."""
        shift, rate = self._shift(), float(np.nan_to_num(self._recent_novel.mean[0]))
        moved = self._moved(rate)
        return DriftState(
            self._n,
            tuple(np.nan_to_num(self._recent_shares.mean).tolist()),
            rate,
            shift,
            moved,
            self._recommended(moved, shift, rate),
            self._names_left(),
            self._is_settled,
        )

    def _names_left(self) -> tuple[str, ...]:
        names = [self.reference.names[n] + "-+"[side] for n, side in np.argwhere(self._left.any(axis=0)).tolist()]
        return tuple([*names, f"{CROWD}+"] if self._has_crowd else names)

    def _shift(self) -> float | None:
        frame = self.reference.frame
        if frame is None or self._recent_mean is None or not self.reference.rms > 0:
            return None
        return float(np.linalg.norm(self._recent_mean.mean - frame.mean)) / self.reference.rms

    def _has_left(self, *names: str) -> tuple[bool, bool]:
        """Whether one of them lies below, above its interval."""
        left = self._left[:, self._rows(names)]
        return bool(left[..., 0].any()), bool(left[..., 1].any())

    def _explains(self, *names: str) -> tuple[bool, bool]:
        """The same where something has left: what points there strongly may be the cause."""
        if not self._left.any():
            return False, False
        detectors = self._against_reference, self._against_beginning
        evidence = np.stack([detector.evidence[self._rows(names)] for detector in detectors]).reshape(-1, 2)
        below, above = self._has_left(*names)
        return below or bool((evidence[:, 0] >= SUPPORT).any()), above or bool((evidence[:, 1] >= SUPPORT).any())

    def _rows(self, names: tuple[str, ...]) -> list[int]:
        return [n for n, name in enumerate(self.reference.names) if name in names]

    def _is_far(self, *names: str) -> bool:
        return bool((np.abs(self._recent.mean[self._rows(names)] - 0.5) > 0.5 - FAR_RANK).any())

    @property
    def _is_held(self) -> bool:
        """Whether the first of what has left did so only just now."""
        return self._left_since is None or self._n - self._left_since < HOLD_PARTS

    def _moved(self, novelty_rate: float) -> tuple[Moved, ...]:
        moved: list[Moved] = []
        is_blurred, is_sharper = self._explains("focus")
        has_contrast = any(self._explains("contrast", "burnt"))
        if any(self._explains("light")) or (has_contrast and not is_blurred and not self._is_held):
            moved.append("light")
        if is_blurred or (is_sharper and not moved):
            moved.append("focus")
        if any(self._explains("right", "down")) and (not moved or self._is_far("right", "down")):
            moved.append("position")
        return tuple(moved) or self._new_kind(novelty_rate)

    def _new_kind(self, novelty_rate: float) -> tuple[Moved, ...]:
        """What novel parts say where the picture says nothing."""
        above = [level for level in LEVELS if self._has_left(f"beyond-{level:g}")[1]]
        if above and not self._is_held and self._is_family(max(above)):
            return ("new_type",) if novelty_rate >= MANY else ("new_family",)
        return ("new_family",) if self._is_crowd_new() else ()

    def _is_crowd_new(self) -> bool:
        """Whether the crowd is a family of its own: not the first sign of a camera or a line that has moved as a whole.

        What moves every part moves the ranks, a few novel parts do not: while evidence against those gathers it is waited for, and once they
        have left their intervals only a crowd that is too small to come of it counts.
        """
        crowd, ranks = self._crowd, ~self._rare
        if crowd is None or crowd.left_for is None:
            return False
        detectors = self._against_reference, self._against_beginning
        is_stirred = any((detector.evidence[ranks] >= SUPPORT).any() for detector in detectors)
        most = FEW if self._left[:, ranks].any() else MANY
        return crowd.left_for >= (CROWD_HOLD_PARTS if is_stirred else HOLD_PARTS) and crowd.rate < most

    def _is_family(self, above: float) -> bool:
        frame = self.reference.frame
        return frame is not None and self._novel.are_family(above, frame.mean)

    def _recommended(self, moved: tuple[Moved, ...], shift: float | None, novelty_rate: float) -> Recommended:
        names = self.reference.names
        has_shifted = any(
            self._has_left(*(n for n in names if n == "novelty" or n.startswith(("direction-", "cluster-"))))
        )
        has_novel = self._has_crowd or self._has_left(*(n for n in names if n.startswith("beyond-")))[1]
        if {"light", "focus", "position"} & set(moved):
            return "camera" if has_shifted or has_novel else "none"
        if moved:  # a new kind, which has been held already
            return "retrain"
        if self._is_held or not (has_shifted or has_novel):
            return "none"
        is_large = novelty_rate > MOST or (shift is not None and shift > LARGE_SHIFT)
        return "retrain" if is_large or not has_shifted else "recentre"


def _mean_of_known(rows: NDArray[np.float64]) -> Vector:
    """(S,) means over the rows that have a value; NaN where none has."""
    known = ~np.isnan(rows)
    sums = np.where(known, rows, 0.0).sum(axis=0)
    return np.asarray(np.where(known.any(axis=0), sums / np.maximum(known.sum(axis=0), 1), np.nan))
