"""Do novel parts crowd where the line's own beginning had none? A new kind does, long before it shows in how many parts are novel.

A class that comes as 2 % of the parts disappears in 5 % of false rejects. But its parts lie alike, seen from the reference's mean, while false
rejects lie where those of the beginning lay. So a part counts as crowded when clearly more of the last novel parts lie as it does than of the
beginning's, and the rate of crowded parts is tested against a beginning of its own, which follows the one that it is compared with.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_dkm.drift.baseline import Baseline
from edge_dkm.drift.detector import MeanDetector
from edge_dkm.drift.novel_parts import directions
from edge_dkm.drift.recent import Recent

CROWD = "crowd"  # as the messages call it
LAST = 64  # novel parts after the run-in, one of a block; at 5 % false rejects, those of the last 1,300 parts
KNOWN = 512  # novel parts of the run-in at most: 3,000 parts have 150 at 5 %
COSINES = (0.4, 0.55, 0.7)  # of parts that lie alike: kinds differ in how closely theirs do
LEAST = 3  # so many alike among the last are no chance ..
TIMES = 3.0  # .. beyond so many times their share of the beginning: kinds that were there vary in number
SAME_PICTURE = 1 - 1e-6  # of float32 directions: the camera's own noise keeps two pictures further apart
TESTED_PARTS = 30  # one observation of the test: a lot's novel parts lie alike, and a burst of them is to say so once
RUN_INS = 2  # the beginning of the rate, in run-ins: it is rare, and its bound falls with the parts it is known from

Vector = NDArray[np.float64]
Direction = NDArray[np.float32]


class Directions:
    """The last `size` unit vectors (D,)."""

    def __init__(self, size: int, dim: int) -> None:
        self._rows, self._n = np.zeros((size, dim), np.float32), 0

    def __len__(self) -> int:
        return min(self._n, len(self._rows))

    def add(self, direction: Direction) -> None:
        self._rows[self._n % len(self._rows)] = direction
        self._n += 1

    def alike(self, direction: Direction) -> Vector:
        """(C,) how many lie within each of COSINES. A picture that comes again, from a recording in a loop, is no further part."""
        cosine = self._rows[: len(self)] @ direction
        return np.array([((cosine >= least) & (cosine < SAME_PICTURE)).sum() for least in COSINES], np.float64)


class Crowd:
    """Tests the rate of crowded parts.

    Args:
        mean: (D,) from where parts are seen.
        block: so many parts are worth no more than one: one of them is compared with, and they are one observation of the beginning.
        false_alarm_every, n_tests: of MeanDetector, but in parts.
        run_in: parts whose novel ones are known; the rate of crowded parts is learned from RUN_INS times as many after them.
    """

    def __init__(
        self, mean: NDArray[np.float32], block: int, false_alarm_every: float, n_tests: int, run_in: int
    ) -> None:
        self._mean, self._block, self._run_in = mean, block, run_in
        self._blocks = -(-TESTED_PARTS // block)  # to an observation of the test
        self._known, self._last = Directions(KNOWN, len(mean)), Directions(LAST, len(mean))
        self._baseline = Baseline(np.array([True]), RUN_INS * run_in // block)
        self._test = MeanDetector(np.zeros(1), np.ones(1), false_alarm_every / (block * self._blocks), n_tests)
        self._recent = Recent(1)
        self._n = self._crowded = self._in_block = 0  # parts: of the run-in; of this block
        self._is_kept = False  # one of this block's
        self._rates: list[Vector] = []  # of the blocks since the last observation of the test
        self.left_for: int | None = None  # parts since the rate has left its interval; None where it is inside

    @property
    def rate(self) -> float:
        """Of crowded parts among the recent ones."""
        return float(np.nan_to_num(self._recent.mean[0]))

    def observe(self, embedding: NDArray[np.float32], is_novel: bool, is_beginning: bool) -> None:
        """One part. `is_beginning`: whether the line is as its reference, so that it may be learned as its own beginning."""
        is_run_in = self._n < self._run_in
        if is_run_in and not is_beginning:
            return
        self._n += is_run_in
        if self.left_for is not None:
            self.left_for += 1
        if is_novel:
            direction = directions(embedding, self._mean).astype(np.float32)
            self._crowded += not is_run_in and self._is_crowded(direction)
            if not self._is_kept:  # parts of a block are worth no more than one
                (self._known if is_run_in else self._last).add(direction)
                self._is_kept = True
        self._in_block += 1
        if self._in_block == self._block:
            if not is_run_in:
                self._observe_block(np.array([self._crowded / self._block]), is_beginning)
            self._crowded, self._in_block, self._is_kept = 0, 0, False

    def _is_crowded(self, direction: Direction) -> bool:
        expected = self._known.alike(direction) * (LAST / max(len(self._known), LAST))
        return bool((self._last.alike(direction) >= LEAST + TIMES * expected).any())

    def _observe_block(self, x: Vector, is_beginning: bool) -> None:
        self._recent.observe(x, self._block)
        self._rates.append(x)
        if len(self._rates) == self._blocks:
            self._observe_test(np.mean(self._rates, axis=0))
            self._rates = []
        if is_beginning and self.left_for is None and self._baseline.observe(x):
            self._test.bound(*self._baseline.interval())

    def _observe_test(self, x: Vector) -> None:
        self._test.observe(x)
        if self.left_for is None and self._test.alarms()[0, 1]:
            self.left_for = 0
        elif self.left_for is not None and self._recent.mean[0] <= self._test.high[0]:
            self.left_for = None
            self._test.forget(np.array([True]))
