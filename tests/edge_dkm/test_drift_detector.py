"""The sequential tests: values by hand, what they promise, and what happens without what the promise needs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_dkm.drift.baseline import BATCHES, Baseline
from edge_dkm.drift.detector import STAKES, MeanDetector
from edge_dkm.drift.recent import MEMORY_PARTS, Recent
from edge_dkm.drift.reference import Means, intervals, poisson_bounds, student


def detector(low: float, high: float, every: float = 1e5) -> MeanDetector:
    return MeanDetector(np.array([low]), np.array([high]), every)


def parts_until_alarm(watch: MeanDetector, values: np.ndarray) -> int | None:
    for n, value in enumerate(values, 1):
        watch.observe(np.array([value]))
        if watch.alarms().any():
            return n
    return None


def test_the_evidence_is_the_bets_worked_out_by_hand() -> None:
    watch = detector(0.0, 0.5)
    watch.observe(np.array([1.0]))
    # Stakes are shares of 1 / 0.5 = 2, and L = 1 + stake (1 - 0.5).
    after_one = [1 + 2 * share * 0.5 for share in STAKES]
    assert watch.evidence[0, 1] == pytest.approx(math.log(np.mean(after_one)))
    watch.observe(np.array([0.25]))
    after_two = [max(first, 1) * (1 - 2 * share * 0.25) for first, share in zip(after_one, STAKES, strict=True)]
    assert watch.evidence[0, 1] == pytest.approx(math.log(np.mean(after_two)))
    # The other side bets on 1 - x against 1 - low = 1, which cannot be exceeded: no gain, ever.
    assert watch.evidence[0, 0] <= 0


def test_what_speaks_for_no_change_is_forgotten_and_what_speaks_for_it_is_capped() -> None:
    watch = detector(0.2, 0.5)
    for _ in range(1000):
        watch.observe(np.array([0.3]))
    fresh = detector(0.2, 0.5)
    for each in (watch, fresh):
        each.observe(np.array([0.9]))
    assert watch.evidence[0, 1] == pytest.approx(fresh.evidence[0, 1])
    for _ in range(5000):
        watch.observe(np.array([1.0]))
    assert watch.alarms().tolist() == [[False, True]] and watch.evidence[0, 1] <= watch.alarm_at + 3


def test_a_mean_that_left_its_interval_is_found_on_its_side() -> None:
    rng = np.random.default_rng(0)
    assert parts_until_alarm(detector(0.3, 0.7), np.ones(100)) is not None
    up, down = detector(0.3, 0.7), detector(0.3, 0.7)
    assert (parts_until_alarm(up, rng.uniform(0.7, 1, 500)) or 999) < 150
    assert (parts_until_alarm(down, rng.uniform(0, 0.3, 500)) or 999) < 150
    assert up.alarms().tolist() == [[False, True]] and down.alarms().tolist() == [[True, False]]


def test_no_false_alarm_at_the_very_edge_and_many_beyond_the_promise_without_the_interval() -> None:
    """The negative control: the same stream, against its mean's point estimate of sixty parts, alarms."""
    rng = np.random.default_rng(1)
    stream, reference = rng.random(5000), rng.random(60) * 0.9
    mean, error = reference.mean(), reference.std(ddof=1) / math.sqrt(60)
    low, high = intervals(
        Means(np.array([mean]), np.array([math.sqrt(2) * error]), np.array([60.0])), np.array([False]), 4, 4
    )
    assert parts_until_alarm(MeanDetector(low, high, 1e5), stream) is None
    assert parts_until_alarm(detector(mean, mean), stream) is not None
    edge = (rng.random(5000) < 0.01).astype(float)
    assert parts_until_alarm(detector(0.0, 0.01), edge) is None


def test_the_first_false_alarm_comes_as_late_as_was_said() -> None:
    """At the edge of the interval, with a promise small enough to be counted: to the first alarm of each stream."""
    rng = np.random.default_rng(2)
    every, lengths = 100.0, []
    for _ in range(25):
        n = parts_until_alarm(
            MeanDetector(np.array([0.0]), np.array([0.5]), every, n_tests=1), (rng.random(600) < 0.5) * 1.0
        )
        lengths.append(n or 600)
    assert np.mean(lengths) >= every


def test_a_statistic_that_is_not_there_changes_nothing() -> None:
    watch = detector(0.3, 0.7)
    watch.observe(np.array([1.0]))
    before = watch.evidence.copy()
    watch.observe(np.array([np.nan]))
    assert np.array_equal(watch.evidence[:, 1], before[:, 1])


def test_only_what_is_forgotten_starts_anew() -> None:
    watch = MeanDetector(np.array([0.3, 0.3]), np.array([0.7, 0.7]), 1e5)
    for _ in range(100):
        watch.observe(np.array([1.0, 1.0]))
    watch.forget(np.array([True, False]))
    assert watch.alarms().tolist() == [[False, False], [False, True]]


def test_poisson_bounds_are_those_of_the_tables() -> None:
    """Exact one-sided bounds at three standard deviations: 6.61 for no event; 22.2 and 2.56 for nine."""
    most, fewest = poisson_bounds(np.array([0.0, 9.0]), 3.0)
    assert most == pytest.approx([6.61, 22.2], rel=0.05)
    assert fewest[0] == 0 and fewest[1] == pytest.approx(2.56, rel=0.05)


def test_few_groups_widen_an_interval() -> None:
    assert student(4.0, 10**6) == pytest.approx(4.0, abs=1e-4)
    assert student(4.0, 20) > 4.8  # Student's quantile with 19 degrees of freedom at 3e-5 is 5.1


def test_a_line_s_beginning_bounds_ranks_closely_and_events_by_their_count() -> None:
    rng = np.random.default_rng(3)
    base = Baseline(np.array([False, True]), 1200)
    changes = [base.observe(np.array([rng.random(), 0.0])) for _ in range(1200)]
    assert np.flatnonzero(changes).tolist() == [399, 799, 1199] and base.is_full
    low, high = base.interval()
    assert 0.38 < low[0] < 0.47 and 0.53 < high[0] < 0.62  # 0.5 by 3.6 errors of 0.0083 and the margin of 0.05
    assert low[1] == 0 and high[1] == pytest.approx(6.74 / 1200, rel=0.01)
    assert not base.observe(np.array([1.0, 1.0])) and len(base._means) == BATCHES


def test_parts_that_come_in_lots_count_for_less() -> None:
    rng = np.random.default_rng(4)
    alone, lots = Baseline(np.array([True]), 2400), Baseline(np.array([True]), 2400)
    lot = np.repeat(rng.random(120) < 0.1, 20)
    for n in range(2400):
        alone.observe(np.array([float(rng.random() < 0.1)]))
        lots.observe(np.array([float(lot[n])]))
    assert lots.interval()[1][0] > 1.5 * alone.interval()[1][0]


def test_recent_means_forget() -> None:
    recent = Recent(2)
    for value in (1.0, 3.0):
        recent.observe(np.array([value, np.nan]))
    assert recent.mean[0] == 2.0 and np.isnan(recent.mean[1])
    for _ in range(10 * MEMORY_PARTS):
        recent.observe(np.array([0.0, 0.5]))
    assert recent.mean == pytest.approx([0.0, 0.5], abs=1e-3)
