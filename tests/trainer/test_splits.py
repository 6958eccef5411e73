from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.data import Dataset
from trainer.errors import DataError
from trainer.splits import Shares, split_by_group


def dataset(groups: list[int], good: list[bool] | None = None) -> Dataset:
    n = len(groups)
    return Dataset(
        torch.zeros(n, 1, 1, 1),
        [None] * n,
        np.full(n, -1),
        [],
        np.array(groups),
        np.array(good if good else [True] * n),
    )  # type: ignore[list-item]


def test_no_group_is_in_two_splits_and_nothing_is_lost() -> None:
    data = dataset([n // 3 for n in range(90)])
    split = split_by_group(data, Shares(), seed=1)
    sets = [set(data.groups[index].tolist()) for index in (split.train, split.radius, split.calibration)]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    assert sorted(np.concatenate([split.train, split.radius, split.calibration]).tolist()) == list(range(90))
    assert [len(s) for s in sets] == [18, 3, 9]


def test_known_defects_never_calibrate_and_are_left_out_where_their_group_is_held_out() -> None:
    data = dataset([n // 2 for n in range(40)], [n % 2 == 0 for n in range(40)])
    split = split_by_group(data, Shares(), seed=0)
    assert data.good[split.radius].all() and data.good[split.calibration].all()
    assert not data.good[split.left_out].any() and len(split.left_out) > 0
    assert not set(data.groups[split.left_out].tolist()) & set(data.groups[split.train].tolist())


def test_the_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    data = dataset(list(range(50)))
    assert np.array_equal(split_by_group(data, Shares(), 1).train, split_by_group(data, Shares(), 1).train)
    assert not np.array_equal(split_by_group(data, Shares(), 1).train, split_by_group(data, Shares(), 2).train)


def test_two_groups_cannot_be_split_and_the_message_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"2 group\(s\).* novelty: none"):
        split_by_group(dataset([0, 0, 1, 1]), Shares(), 0)


def test_three_groups_are_enough() -> None:
    split = split_by_group(dataset([0, 1, 2]), Shares(), 0)
    assert [len(split.train), len(split.radius), len(split.calibration)] == [1, 1, 1]


def test_shares_must_sum_to_one() -> None:
    with pytest.raises(ValueError, match=r"sum to 1\.1, expected 1"):
        Shares(train=0.7)


def test_a_group_of_more_than_a_tenth_of_the_good_parts_is_learned_from_whatever_the_seed() -> None:
    data = dataset([0] * 20 + list(range(1, 81)))
    for seed in range(8):
        split = split_by_group(data, Shares(), seed)
        assert 0 in data.groups[split.train]
        assert [len(np.unique(data.groups[i])) for i in (split.train, split.radius, split.calibration)] == [49, 8, 24]
    ordinary = dataset([0] * 9 + list(range(1, 92)))
    assert any(0 not in ordinary.groups[split_by_group(ordinary, Shares(), seed).train] for seed in range(8))
