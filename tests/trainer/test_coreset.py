from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.bank.coreset import greedy_coreset


def rows(count: int = 300, dim: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def cover(x: Tensor, chosen: Tensor) -> float:
    """How far the worst row is from those chosen."""
    return float(torch.cdist(x, x[chosen]).amin(1).max())


def test_each_point_is_the_farthest_from_those_before_it() -> None:
    x = rows()
    chosen = greedy_coreset(x, 20, seed=1)
    assert len(chosen.unique()) == 20
    for n in range(1, 20):
        apart = torch.cdist(x, x[chosen[:n]]).amin(1)
        assert float(apart[chosen[n]]) == pytest.approx(float(apart.max()), rel=1e-4)


def test_on_a_line_by_hand() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [4.0]])
    for seed in range(5):
        chosen = set(greedy_coreset(x, 3, seed).tolist())
        # From either end: the other end, then 4, which is farthest from both; from inside: 10, then 0 or 4.
        assert 3 in chosen and chosen & {0, 4}


def test_it_leaves_no_row_far_and_a_random_sample_does() -> None:
    rare = torch.tensor([[30.0, 0.0, 0.0, 0.0], [0.0, -30.0, 0.0, 0.0]])
    x = torch.cat([rows(2000), rare])
    ours = cover(x, greedy_coreset(x, 20, seed=0))
    sampled = [cover(x, torch.randperm(len(x), generator=torch.Generator().manual_seed(n))[:20]) for n in range(5)]
    assert ours < 4 < 20 < min(sampled)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_copies_of_what_is_chosen_end_it(scale: float) -> None:
    x = scale * rows(20, dim=48).repeat(10, 1)
    chosen = greedy_coreset(x, 100, seed=0)
    assert len(chosen) == 20 and len(x[chosen].unique(dim=0)) == 20


def test_all_rows_are_chosen_where_there_are_no_more() -> None:
    assert greedy_coreset(rows(5), 5, seed=0).tolist() == [0, 1, 2, 3, 4]
    assert greedy_coreset(rows(5), 9, seed=0).tolist() == [0, 1, 2, 3, 4]


def test_equal_seeds_choose_equally_and_others_start_elsewhere() -> None:
    x = rows()
    assert torch.equal(greedy_coreset(x, 10, seed=4), greedy_coreset(x, 10, seed=4))
    assert len({int(greedy_coreset(x, 10, seed=n)[0]) for n in range(5)}) > 1
