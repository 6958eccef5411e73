from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.clustering.ownership import Ownership, OwnershipOptions, decide_owners
from trainer.errors import DataError

NORMALISED = OwnershipOptions(vote="normalised")


def owners_of(y: list[int], communities: list[int], options: OwnershipOptions | None = None) -> Ownership:
    return decide_owners(torch.tensor(y), torch.tensor(communities), options)


def test_owners_and_both_kinds_of_samples_by_hand() -> None:
    found = owners_of([0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1], OwnershipOptions(min_correct=1))
    assert found.owners.tolist() == [0, 1]
    assert found.correct.tolist() == [True, True, False, True, True, False]
    assert found.misclustered.tolist() == [False, False, True, False, False, True]
    assert found.owner_of_sample.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.correct_counts.tolist() == [2, 2]


def test_the_vote_is_the_matching_of_largest_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        y = torch.randint(3, (25,), generator=generator)
        communities = torch.unique(torch.randint(4, (25,), generator=generator), return_inverse=True)[1]
        n_communities = int(communities.max()) + 1
        every_matching = torch.cartesian_prod(*[torch.arange(3)] * n_communities).reshape(-1, n_communities)
        overlaps = (every_matching[:, communities] == y).sum(1)
        found = decide_owners(y, communities)
        assert int(found.correct.sum()) == int(overlaps.max())


def test_a_tie_goes_to_the_larger_share_of_its_class_then_to_the_lowest_id() -> None:
    # Two of three of class 1 against two of four of class 0; then all classes alike.
    assert owners_of([0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 2]).owners.tolist() == [1, 0, 1]
    assert owners_of([2, 1, 2, 1], [0, 0, 1, 1]).owners.tolist() == [1, 1]
    # Normalised: 1/2 of class 0 against 2/4 of class 1, the larger count wins.
    assert owners_of([0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 1, 2], NORMALISED).owners.tolist() == [1, 0, 1]


def test_a_rare_class_owns_its_community_only_under_the_normalised_vote() -> None:
    y = [0] * 100 + [1] * 6
    communities = [0] * 90 + [1] * 10 + [1] * 6
    normalised, plain = owners_of(y, communities, NORMALISED), owners_of(y, communities)
    assert normalised.owners.tolist() == [0, 1] and plain.owners.tolist() == [0, 0]
    assert normalised.active.tolist() == [True, True] and plain.active.tolist() == [True, False]
    assert torch.nonzero(normalised.misclustered)[:, 0].tolist() == list(range(90, 100))
    assert torch.nonzero(plain.misclustered)[:, 0].tolist() == list(range(100, 106))


@pytest.mark.parametrize(("size", "active"), [(4, False), (5, True)])
def test_a_class_with_few_correctly_clustered_samples_is_not_acted_on(size: int, active: bool) -> None:
    found = owners_of([0] * 9 + [1] * size, [0] * 9 + [1] * size)
    assert found.correct_counts.tolist() == [9, size] and found.active.tolist() == [True, active]


def test_samples_without_a_label_neither_vote_nor_are_either_kind() -> None:
    found = owners_of([-1, -1, -1, 0, 1, 1, -1], [0, 0, 0, 0, 1, 1, 2])
    assert found.owners.tolist() == [0, 1, -1]
    assert found.correct.tolist() == [False, False, False, True, True, True, False]
    assert not found.misclustered.any()


def test_a_class_with_one_image_among_another_is_misclustered_and_owns_nothing() -> None:
    found = owners_of([0, 0, 0, 1], [0, 0, 0, 0])
    assert found.owners.tolist() == [0] and found.misclustered.tolist() == [False, False, False, True]
    assert not found.active[1]


def test_figures_tell_how_well_communities_fit_classes() -> None:
    figures = owners_of([0, 0, 0, 2, 2, -1], [0, 0, 1, 0, 1, 2]).figures()  # nothing has class 1
    assert figures["communities"] == 3 and figures["communities_per_class"] == 1.5
    assert figures["classes_owning_none"] == 0.0 and figures["correctly_clustered"] == pytest.approx(3 / 5)
    assert owners_of([0, 0, 1], [0, 0, 0]).figures()["classes_owning_none"] == 0.5


def test_without_any_label_the_setting_is_named() -> None:
    with pytest.raises(DataError, match=r"none of the 3 images has a class.*data\.path with one folder"):
        owners_of([-1, -1, -1], [0, 0, 1])


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="2 classes but 3 communities"):
        owners_of([0, 1], [0, 0, 1])


def test_sample_order_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(-1, 4, (200,), generator=generator)
    communities = torch.arange(200) % 11
    order = torch.randperm(200, generator=generator)
    whole, shuffled = decide_owners(y, communities), decide_owners(y[order], communities[order])

    def back(values: Tensor) -> Tensor:
        return torch.empty_like(values).index_copy(0, order, values)

    assert torch.equal(shuffled.owners, whole.owners)
    assert torch.equal(back(shuffled.correct), whole.correct)
    assert torch.equal(back(shuffled.misclustered), whole.misclustered)
