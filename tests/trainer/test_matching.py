from __future__ import annotations

import torch

from trainer.clustering.matching import label_names, match


def test_shuffled_centroids_are_put_back_in_order() -> None:
    previous = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    found = torch.tensor([[0.5, 9.0], [0.2, 0.1], [9.0, 0.3]])
    assert match(previous, found).tolist() == [1, 2, 0]
    assert not torch.allclose(found, previous, atol=1.1)  # control: as found they do not line up
    assert torch.allclose(found[match(previous, found)], previous, atol=1.1)


def test_the_sum_decides_not_each_centroid_for_itself() -> None:
    previous, found = torch.tensor([[0.0], [3.0]]), torch.tensor([[2.0], [-10.0]])
    # Both old centroids are nearest to 2; (2, -10) costs 4 + 169, (-10, 2) costs 100 + 1.
    assert match(previous, found).tolist() == [1, 0]


def test_a_single_centroid_matches_itself() -> None:
    assert match(torch.zeros(1, 3), torch.ones(1, 3)).tolist() == [0]


def test_labels_are_renamed_by_hand() -> None:
    reference, labels = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([2, 2, 1, 0, 0, 1])
    assert label_names(reference, labels, 3)[labels].tolist() == [0, 0, 2, 1, 1, 2]


def test_renaming_never_changes_who_is_together() -> None:
    labels = torch.randint(4, (50,), generator=torch.Generator().manual_seed(0))
    renamed = label_names(torch.randint(4, (50,), generator=torch.Generator().manual_seed(1)), labels, 4)[labels]
    assert torch.equal(labels[:, None] == labels, renamed[:, None] == renamed)
