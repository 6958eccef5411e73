from __future__ import annotations

import torch

from trainer.samplers import balanced, classes_by_images, soft_balanced


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_cluster_comes_equally_often_however_small_it_is() -> None:
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    drawn = balanced(labels, generator())
    assert len(drawn) == 100
    counts = torch.bincount(labels[drawn], minlength=3)
    assert int(counts.min()) >= 100 - 2 * 34 and int(counts.max()) <= 34


def test_a_cluster_that_is_large_enough_is_drawn_without_repeats() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    drawn = balanced(labels, generator())
    large, small = drawn[labels[drawn] == 0], drawn[labels[drawn] == 1]
    assert len(torch.unique(large)) == len(large) >= 49
    # The small one gives all it has before anything comes once more.
    assert int(torch.bincount(small)[90:].min()) >= 4


def test_empty_clusters_and_samples_without_one_are_never_drawn() -> None:
    labels = torch.tensor([-1, 5, 5, 9, -1, 9])
    drawn = balanced(labels, generator())
    assert set(drawn.tolist()) <= {1, 2, 3, 5}


def test_the_same_seed_gives_the_same_order_and_another_seed_another() -> None:
    labels = torch.arange(40) % 4
    assert torch.equal(balanced(labels, generator(1)), balanced(labels, generator(1)))
    assert not torch.equal(balanced(labels, generator(1)), balanced(labels, generator(2)))


def test_soft_labels_fill_every_live_cluster_alike() -> None:
    ids = torch.tensor([[0, 1]] * 95 + [[1, 2]] * 5)
    weights = torch.tensor([[1.0, 0.0]] * 95 + [[0.5, 0.5]] * 5)
    drawn = torch.cat([soft_balanced(ids, weights, 4, generator(seed)) for seed in range(40)])
    rare = float((drawn >= 95).double().mean())
    # Clusters 1 and 2 live in the last five samples alone, cluster 3 nowhere: two draws of three go there.
    assert 0.62 < rare < 0.71


def test_every_batch_holds_as_many_images_of_each_of_its_classes() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3 + [3] * 17 + [-1] * 20)
    order = classes_by_images(labels, classes=3, images=4, batches=8, generator=generator())
    assert len(order) == 8 * 12
    for batch in order.split(12):
        counts = torch.bincount(labels[batch], minlength=4)
        assert sorted(counts.tolist()) == [0, 4, 4, 4]
    assert int(labels[order].min()) >= 0


def test_classes_take_turns_so_that_none_is_left_out() -> None:
    labels = torch.arange(70) % 7
    order = classes_by_images(labels, classes=2, images=2, batches=7, generator=generator())
    assert torch.bincount(labels[order], minlength=7).tolist() == [4] * 7


def test_fewer_classes_than_asked_for_fill_the_batch_with_more_images_each() -> None:
    labels = torch.tensor([0] * 10 + [1] * 10)
    order = classes_by_images(labels, classes=5, images=3, batches=2, generator=generator())
    for batch in order.split(15):
        assert sorted(torch.bincount(labels[batch]).tolist()) == [7, 8]
