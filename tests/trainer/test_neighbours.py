from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.clustering import neighbours as module
from trainer.clustering.neighbours import lowest, nearest_neighbours, neighbours_within


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(queries: Tensor, points: Tensor) -> Tensor:
    return (queries.double()[:, None] - points.double()).square().sum(-1)


def test_neighbours_on_a_line_by_hand() -> None:
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    found = neighbours_within(points, 2)
    assert found.ids.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert torch.allclose(found.d2, torch.tensor([[1.0, 9.0], [1.0, 4.0], [4.0, 9.0], [16.0, 36.0]]))


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_neighbours_are_those_of_brute_force_in_float64(offset: float) -> None:
    queries, points = normal(150, 12) + offset, normal(400, 12, seed=1) + offset
    d2 = brute_force(queries, points)
    found = nearest_neighbours(queries, points, 9)
    assert torch.equal(found.ids, d2.argsort(dim=1)[:, :9])
    assert torch.allclose(found.d2.double(), d2.gather(1, found.ids), rtol=1e-4)
    within = brute_force(points, points).fill_diagonal_(torch.inf)
    assert torch.equal(neighbours_within(points, 9).ids, within.argsort(dim=1)[:, :9])


def test_chunks_give_the_neighbours_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    points = normal(101, 5)
    whole = neighbours_within(points, 6)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 7 * len(points))
    parts = neighbours_within(points, 6)
    assert torch.equal(parts.ids, whole.ids) and torch.allclose(parts.d2, whole.d2, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 500])
def test_asking_for_more_than_there_are_gives_all_and_never_a_negative_id(count: int) -> None:
    points = normal(5, 3)
    assert neighbours_within(points, count).ids.shape == (5, min(count, 4))
    assert nearest_neighbours(normal(2, 3, seed=1), points, count).ids.shape == (2, min(count, 5))
    ids = neighbours_within(points, count).ids
    assert ids.min() >= 0 and not (ids == torch.arange(5)[:, None]).any()


def test_a_lone_point_has_no_neighbours_and_no_query_no_answer() -> None:
    assert neighbours_within(normal(1, 3), 4).ids.shape == (1, 0)
    assert nearest_neighbours(normal(0, 3), normal(6, 3), 4).ids.shape == (0, 4)


def test_of_equally_near_points_the_lowest_ids_are_taken() -> None:
    corners = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]).repeat(40, 1)
    assert nearest_neighbours(torch.zeros(1, 2), corners, 7).ids.tolist() == [list(range(7))]
    values = torch.tensor([[2.0, 1.0, 2.0, 0.0, 2.0, 1.0]])
    assert [lowest(values, count).tolist() for count in (0, 2, 4, 6)] == [
        [[]],
        [[3, 1]],
        [[3, 1, 5, 0]],
        [[3, 1, 5, 0, 2, 4]],
    ]


@pytest.mark.parametrize("n", [2000, 4111])
def test_of_long_rows_the_lowest_are_those_of_a_full_stable_sort_also_among_ties_and_infinities(n: int) -> None:
    few_values = torch.randint(0, 60, (9, n), generator=torch.Generator().manual_seed(2)).float()
    late = torch.arange(n, 0, -1.0).repeat(2, 1)  # the smallest are in the last, incomplete block
    barred = normal(3, n).masked_fill(torch.arange(n) % 40 != 0, torch.inf)
    for values in (normal(9, n), few_values, late, barred):
        for count in (1, 5, 15):
            assert torch.equal(lowest(values, count), values.argsort(dim=1, stable=True)[:, :count])


def test_duplicates_are_neighbours_but_a_point_is_not_its_own() -> None:
    points = torch.zeros(4, 2)
    assert neighbours_within(points, 2).ids.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]
    assert (neighbours_within(points, 2).d2 == 0).all()


def test_half_precision_is_searched_in_single_and_the_input_stays() -> None:
    points = normal(30, 4).half()
    before = points.clone()
    found = neighbours_within(points, 3)
    assert found.d2.dtype == torch.float32 and torch.equal(points, before)
    assert torch.equal(found.ids, neighbours_within(points.float(), 3).ids)


def test_what_cannot_be_searched_is_refused_with_the_values() -> None:
    with pytest.raises(ValueError, match=r"neighbours of \(2, 3\) among \(5, 4\)"):
        nearest_neighbours(normal(2, 3), normal(5, 4), 1)
    with pytest.raises(ValueError, match=r"among \(0, 3\)"):
        nearest_neighbours(normal(2, 3), normal(0, 3), 1)
    with pytest.raises(ValueError, match="number of neighbours is 0"):
        neighbours_within(normal(5, 4), 0)
