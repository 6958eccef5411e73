"""The edge on the device is the trainer's, to the last digit; and novel parts count where they lie above it."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
from scipy.stats import betabinom

from edge_dkm.calibration import BEYOND, Known, Novel, calibrate
from edge_dkm.recentring.interval import false_reject_interval
from trainer.novelty import NoveltySettings
from trainer.novelty import calibrate as trainers_calibrate

Unit = Literal["part", "group"]


def scores(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(3, 0.4, n).astype(np.float32)


def known(s: list[float], groups: list[int], held: float = 1000.0) -> Known:
    return Known(Novel(np.array(s, np.float32), np.array(groups)), held)


@pytest.mark.parametrize("unit", ["part", "group"])
@pytest.mark.parametrize("target_frr", [0.01, 0.05, 0.3])
@pytest.mark.parametrize(("n", "n_groups"), [(3, 2), (19, 19), (40, 40), (200, 23), (1000, 150)])
def test_it_is_the_trainers_calibration(unit: Unit, target_frr: float, n: int, n_groups: int) -> None:
    s, groups = scores(n, n), np.random.default_rng(1).integers(0, n_groups, n)
    groups = np.arange(n) if n == n_groups else groups
    ours = calibrate(s, groups, target_frr, unit=unit)
    theirs = trainers_calibrate(s, groups, NoveltySettings(target_frr=target_frr, unit=unit))
    assert (ours.scale, ours.groups, ours.promised_frr) == (theirs.scale, theirs.groups, theirs.promised_frr)
    assert np.array_equal(ours.scores, theirs.scores) and np.array_equal(ours.weights, theirs.weights)
    assert ours.is_weaker_than_asked == theirs.is_weaker_than_asked


def test_a_novel_part_beyond_the_new_edge_counts_as_lying_above_it() -> None:
    s, one_each = np.arange(1, 181, dtype=np.float32), np.arange(180)  # 180 let through, 20 novel, each its own group
    edge = calibrate(s, one_each, 0.2, known=known([300] * 20, list(range(180, 200))))
    assert (edge.groups, edge.total, edge.above, edge.is_held) == (180, 200, 20, False)
    assert edge.scale == 161  # 0.8 * 201 = 160.8; of the 180 alone it would be 0.8 * 181 = 144.8
    assert calibrate(s, one_each, 0.2).scale == 145
    assert edge.beyond == 19 + 20 and edge.promised_frr == 0.2


def test_a_novel_part_that_the_new_edge_lets_in_counts_for_nothing() -> None:
    s, one_each = np.arange(1, 181, dtype=np.float32), np.arange(180)
    edge = calibrate(s, one_each, 0.2, known=known([2] * 20 + [300] * 10, list(range(180, 210))))
    assert (edge.total, edge.seen, edge.above, edge.scale) == (190, 210, 10, 153)  # 0.8 * 191 = 152.8


@pytest.mark.parametrize("share_good", [0, 0.3, 1])
def test_the_promise_holds_however_many_of_the_novel_parts_were_good(share_good: float) -> None:
    s, of_novel = scores(5, 900), scores(6, 80) * 2
    edge = calibrate(s, np.arange(900), 0.05, known=Known(Novel(of_novel, np.arange(900, 980)), 1000.0))
    strangest_first = np.sort(of_novel)[::-1][: int(share_good * 80)]  # the worst that could have been good
    assert not edge.is_held and np.mean(np.concatenate([s, strangest_first]) > edge.scale) <= 0.05


def test_with_more_above_than_the_target_the_edge_of_the_training_holds_and_it_says_what_that_proves() -> None:
    s = np.arange(1, 901, dtype=np.float32)
    above = Novel(np.full(100, 2000, np.float32), np.arange(900, 1000))
    edge = calibrate(s, np.arange(900), 0.05, known=Known(above, 890.0))
    assert edge.is_held and edge.scale == 890 and edge.is_weaker_than_asked
    assert edge.promised_frr == pytest.approx((1 + 10 + 100) / 1001)


def test_few_groups_do_not_move_the_edge() -> None:
    s = np.arange(1, 101, dtype=np.float32)
    few = calibrate(s, np.arange(100), 0.05, known=known([], [], held=97.5))
    assert few.is_held and few.scale == 97.5 and few.promised_frr == 0.05  # three lie beyond: 4 / 101
    assert not calibrate(np.tile(s, 2), np.arange(200), 0.05, known=known([], [], held=97.5)).is_held


def test_shots_of_one_part_share_its_weight_whether_let_through_or_not() -> None:
    edge = calibrate(np.array([1, 2, 3], np.float32), np.array([7, 7, 8]), 0.5, known=known([9, 9, 9], [8, 8, 8], 5))
    assert edge.weights.tolist() == [0.5, 0.5, 0.25] and edge.above == 0.75 and edge.total == 2


def test_by_group_one_novel_shot_makes_the_whole_part_novel() -> None:
    shots = np.array([1, 2, 3], np.float32), np.array([7, 7, 8])
    edge = calibrate(*shots, 0.5, unit="group", known=known([9], [8], 5))
    assert edge.scores.tolist() == [2.0] and edge.above == 1 and edge.total == 2
    assert len(calibrate(*shots, 0.5, unit="group", known=known([9, 9], [7, 8], 5)).scores) == 3  # nothing else is left


def test_the_codebooks_p_values_agree_with_the_edge() -> None:
    edge = calibrate(scores(3, 200), np.arange(200), 0.05, known=known([90] * 4, [200, 201, 202, 203]))
    tensors = edge.tensors()
    assert tensors["calibration"][-1] == np.float32(BEYOND) and tensors["calibration_weight"].sum() == 204

    def p_value(s: float) -> float:
        at_least = tensors["calibration_weight"][tensors["calibration"] >= s].sum()
        return float((1 + at_least) / (1 + tensors["calibration_weight"].sum()))

    assert p_value(edge.scale * 1.0001) <= 0.05 < p_value(edge.scale)


EDGE = 1.6449  # a tenth of a normal's absolute values lies beyond


def nights(n: int, counts_novel: bool, defects: float = 0.0) -> list[float]:
    """False-reject rates of thirty nights without any drift: each calibrates on what the one before let through."""
    rng, edge, rates = np.random.default_rng(0), EDGE, []
    for _ in range(30):
        s, groups = np.abs(rng.normal(size=n)).astype(np.float32), np.arange(n)
        s[: int(defects * n)] = 9.0
        out = s > edge
        beside = Known(Novel(s[out], groups[out]), EDGE) if counts_novel else None
        edge = calibrate(s[~out], groups[~out], 0.1, known=beside).scale
        rates.append(float((np.abs(rng.normal(size=20_000)) > edge).mean()))
    return rates


@pytest.mark.parametrize("defects", [0.0, 0.04, 0.15])
@pytest.mark.parametrize("n", [30, 6000])
def test_night_after_night_the_rate_stays_where_it_is(n: int, defects: float) -> None:
    assert all(0.04 < rate < 0.13 for rate in nights(n, counts_novel=True, defects=defects))


def test_control_without_the_novel_parts_the_gate_closes() -> None:
    rates = nights(6000, counts_novel=False)[:10]
    assert rates[-1] > 0.5 and all(b > a for a, b in pairwise(rates))


@pytest.mark.parametrize(
    ("above", "below", "n"), [(4, 60, 20), (1, 99, 50), (10, 990, 400), (2.5, 40.5, 30), (1, 1, 0)]
)
def test_the_interval_is_scipys(above: float, below: float, n: int) -> None:
    low, high = betabinom(n, above, below).interval(0.95)
    assert false_reject_interval(above, below, n) == (int(low), int(high))
