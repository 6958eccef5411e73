from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trainer.novelty import NoveltySettings, calibrate, groups_needed, novelty_distance, p_value, radii, raw_score


def test_raw_score_is_the_distance_in_radii_of_the_own_cluster() -> None:
    z, means = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    ids = torch.tensor([0, 1])
    distance = novelty_distance(z, means, ids)
    assert distance.tolist() == [5.0, 2.0]
    assert raw_score(distance, torch.tensor([2.0, 4.0]), ids).tolist() == [2.5, 0.5]


def test_radius_is_the_median_shrunk_by_ten_pooled_parts() -> None:
    # Cluster 0: median 2 of 3 parts; cluster 1: one part of 6; cluster 2: none. Pooled median of 1, 2, 3, 6 = 2.5.
    values = radii(torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0, 0, 0, 1]), 3).tolist()
    assert values == pytest.approx([(3 * 2 + 10 * 2.5) / 13, (1 * 6 + 10 * 2.5) / 11, 2.5])


def test_identical_parts_do_not_give_a_radius_of_zero() -> None:
    assert float(radii(torch.zeros(5), torch.zeros(5, dtype=torch.long), 1)[0]) > 0


def test_scale_by_hand_with_one_part_per_group() -> None:
    # G = 19, alpha = .1: (1 - .1) * 20 = 18, so the 18th smallest score.
    scores = np.arange(1, 20, dtype=np.float32)
    result = calibrate(scores, np.arange(19), NoveltySettings(target_frr=0.1))
    assert (result.scale, result.groups, result.promised_frr) == (18.0, 19, 0.1)


def test_a_group_counts_once_however_many_parts_it_has() -> None:
    # Three groups; the first has four parts of weight 1/4. alpha = .25 needs .75 * 4 = 3: all weight, the largest score.
    scores = np.array([1, 2, 3, 4, 5, 6], np.float32)
    groups = np.array([0, 0, 0, 0, 1, 2])
    assert calibrate(scores, groups, NoveltySettings(target_frr=0.25)).scale == 6.0
    # alpha = .5 needs 2: 1/4 + 1/4 + 1/4 + 1/4 + 1 -> the fifth.
    assert calibrate(scores, groups, NoveltySettings(target_frr=0.5)).scale == 5.0


def test_the_group_unit_takes_the_strangest_part_of_each_group() -> None:
    scores, groups = np.array([1, 9, 2, 3], np.float32), np.array([0, 0, 1, 2])
    result = calibrate(scores, groups, NoveltySettings(target_frr=0.5, unit="group"))
    assert result.scores.tolist() == [2.0, 3.0, 9.0] and result.scale == 3.0


def test_too_few_groups_promise_the_smallest_rate_they_can() -> None:
    result = calibrate(np.arange(9, dtype=np.float32) + 1, np.arange(9), NoveltySettings(target_frr=0.01))
    assert result.promised_frr == pytest.approx(0.1) and result.scale == 9.0 and result.is_weaker_than_asked
    assert groups_needed(0.01) == 99
    enough = calibrate(np.arange(99, dtype=np.float32) + 1, np.arange(99), NoveltySettings(target_frr=0.01))
    assert enough.promised_frr == 0.01 and enough.scale == 99.0


def test_p_value_by_hand() -> None:
    calibration, weight = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.5, 0.5])
    # G = 2: (1 + weights at or above s) / 3.
    assert p_value(torch.tensor([0.5, 2.0, 3.5]), calibration, weight).tolist() == pytest.approx([1.0, 2 / 3, 1 / 3])


def test_p_value_is_at_most_alpha_exactly_where_a_part_is_novel() -> None:
    rng = np.random.default_rng(0)
    result = calibrate(rng.gamma(3, size=199).astype(np.float32), np.arange(199), NoveltySettings(target_frr=0.05))
    s = torch.from_numpy(rng.gamma(3, size=500).astype(np.float32))
    p = p_value(s, torch.from_numpy(result.scores), torch.from_numpy(result.weights))
    assert torch.equal(s > result.scale, p <= 0.05 + 1e-6)


def rejected_share(per_group: int, unit_weights: bool, seed: int) -> float:
    """Share of parts of new groups above the edge, over many draws; a group's parts share an offset, and groups differ in size."""
    rng = np.random.default_rng(seed)

    def draw(n_groups: int) -> tuple[np.ndarray, np.ndarray]:
        sizes = rng.integers(1, per_group + 1, n_groups)
        offset = rng.normal(0, 1, n_groups) + 0.4 * sizes  # large groups are strange ones
        index = np.repeat(np.arange(n_groups), sizes)
        return (offset[index] + rng.normal(0, 0.5, len(index))).astype(np.float32), index

    misses = []
    for _ in range(400):
        scores, groups = draw(40)
        scale = calibrate(
            scores, groups if unit_weights else np.arange(len(scores)), NoveltySettings(target_frr=0.1)
        ).scale
        new, index = draw(1)
        misses.append(float((new > scale).mean()) if len(index) else 0.0)
    return float(np.mean(misses))


def test_the_promise_holds_for_new_groups() -> None:
    share = rejected_share(6, unit_weights=True, seed=1)
    assert share <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 400)


def test_control_exchangeable_parts_are_rejected_at_the_target_rate_and_not_far_below() -> None:
    share = rejected_share(1, unit_weights=True, seed=2)
    assert 0.05 <= share <= 0.15
