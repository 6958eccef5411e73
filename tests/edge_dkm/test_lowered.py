"""The gate of a lowered precision, on answers and times made up for it; OpenVINO itself goes through it in test_openvino.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_dkm.golden import Golden
from edge_dkm.lowered import MIN_WINS, PAIRS, answers_problem, spearman, speed_problem

SCORES = np.linspace(0.2, 2.1, 20).astype(np.float32)


def golden() -> Golden:
    """Twenty images, two clusters in turns, far apart; the last one lies nearly between them."""
    distances = np.tile(np.array([[0.5, 1.5], [1.5, 0.5]], np.float32), (10, 1))
    distances[-1] = 1.0, 0.99
    images = [np.zeros((1, 1, 3), np.uint8)] * 20
    return Golden(images, ["part"] * 20, distances, SCORES, {}, 1e-4)


def test_equal_answers_pass() -> None:
    assert answers_problem(golden(), golden().distances, SCORES, "bf16") is None


def test_small_differences_pass_at_the_lowered_tolerance_and_not_at_that_of_a_finer_one() -> None:
    near = SCORES + np.float32(0.02)
    assert answers_problem(golden(), golden().distances, near, "bf16") is None
    assert "a novelty_score is 0.02 away, expected at most 0.005" in str(
        answers_problem(golden(), golden().distances, near, "fp16")
    )


def test_a_decisive_image_of_another_cluster_fails_and_is_named() -> None:
    swapped = golden().distances.copy()
    swapped[3] = swapped[3, ::-1]
    assert answers_problem(golden(), swapped, SCORES, "bf16") == "golden image 3 (part) is cluster 0, expected 1"


def test_an_image_between_two_clusters_may_differ_but_one_in_twenty_is_too_many() -> None:
    swapped = golden().distances.copy()
    swapped[-1] = swapped[-1, ::-1]
    assert (
        answers_problem(golden(), swapped, SCORES, "bf16")
        == "95.0% of the golden images keep their cluster, expected 99.5%"
    )


def test_scores_in_another_order_fail() -> None:
    shuffled = SCORES.copy()
    shuffled[:6] = shuffled[5::-1]
    assert "correlate by 0.9" in str(answers_problem(golden(), golden().distances, shuffled, "bf16"))
    assert "correlate by nan" in str(answers_problem(golden(), golden().distances, np.ones_like(SCORES), "bf16"))


def test_far_away_distances_and_answers_that_are_not_finite_fail() -> None:
    stretched = golden().distances * np.float32(1.2)
    assert answers_problem(golden(), stretched, SCORES, "bf16") == "a distance is 0.2 away, expected at most 0.05"
    broken = SCORES.copy()
    broken[4] = np.nan
    assert answers_problem(golden(), golden().distances, broken, "bf16") == "an answer is not finite"


def test_the_files_own_tolerance_counts_where_it_is_wider() -> None:
    wide = replace(golden(), tolerance=0.5)
    assert answers_problem(wide, wide.distances, SCORES + np.float32(0.3), "bf16") is None


def test_spearman_by_hand() -> None:
    a = np.array([1, 2, 3, 4], np.float32)
    assert spearman(a, a * 10) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = (1, -1, 0, 0)
    assert spearman(a, np.array([2, 1, 3, 4], np.float32)) == pytest.approx(1 - 6 * 2 / (4 * 15))
    # equal values share their mean rank: ranks (1.5, 1.5, 3) against (1, 2, 3)
    assert spearman(np.array([5, 5, 9], np.float32), np.array([1, 2, 3], np.float32)) == pytest.approx(0.75**0.5)


def test_only_what_is_measurably_faster_passes() -> None:
    full = [1.0] * PAIRS
    assert speed_problem([0.5] * PAIRS, full) is None
    assert "takes 1.00 times as long as fp32 here and is faster in 0 of 15" in str(speed_problem(full, full))
    assert "takes 0.97 times" in str(speed_problem([0.97] * PAIRS, full))  # faster in each pair, but hardly
    lucky = [0.5] * (MIN_WINS - 1) + [1.5] * (PAIRS - MIN_WINS + 1)
    assert f"faster in {MIN_WINS - 1} of {PAIRS} pairs" in str(speed_problem(lucky, full))
    assert speed_problem([0.5] * MIN_WINS + [1.5] * (PAIRS - MIN_WINS), full) is None
