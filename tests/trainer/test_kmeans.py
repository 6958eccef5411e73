from __future__ import annotations

import pytest
import torch

from trainer.clustering.kmeans import KMeansOptions, cluster_means, kmeans, plus_plus
from trainer.errors import DataError


def blobs(k: int = 4, each: int = 30, spread: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(k, 5, generator=generator) * 5
    truth = torch.arange(k).repeat_interleave(each)
    return centres[truth] + spread * torch.randn(k * each, 5, generator=generator), truth


def test_four_points_by_hand() -> None:
    z = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0]])
    result = kmeans(z, 2, seed=0)
    order = result.centroids[:, 0].argsort()
    assert result.centroids[order].tolist() == [[0.0, 1.0], [10.0, 1.0]]
    assert result.inertia == 4.0
    assert result.labels[0] == result.labels[1] != result.labels[2] == result.labels[3]


def test_separate_blobs_are_found_whatever_the_seed() -> None:
    z, truth = blobs()
    for seed in range(5):
        labels = kmeans(z, 4, seed).labels
        assert len({(int(a), int(b)) for a, b in zip(labels, truth, strict=True)}) == 4


def test_the_same_seed_gives_equal_arrays() -> None:
    z = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    first, second = kmeans(z, 7, 3), kmeans(z, 7, 3)
    assert torch.equal(first.centroids, second.centroids) and torch.equal(first.labels, second.labels)


def test_inertia_is_the_sum_of_squared_distances_of_a_slow_loop() -> None:
    z = torch.randn(60, 3, generator=torch.Generator().manual_seed(2))
    result = kmeans(z, 5, 0)
    slow = sum(min(float((point - centre).square().sum()) for centre in result.centroids) for point in z)
    assert result.inertia == pytest.approx(slow, rel=1e-5)


def test_more_restarts_never_end_worse() -> None:
    z = torch.rand(300, 2, generator=torch.Generator().manual_seed(3))
    one, many = (kmeans(z, 12, 0, KMeansOptions(n_init=n)).inertia for n in (1, 20))
    assert many <= one


def test_given_centroids_are_refined_in_one_run() -> None:
    z, truth = blobs()
    start = cluster_means(z, truth, 4)
    assert torch.allclose(kmeans(z, 4, 0, init=start).centroids, start, atol=1e-5)


def test_an_empty_cluster_is_moved_to_the_farthest_point() -> None:
    z = torch.tensor([[0.0], [1.0], [9.0]])
    means = cluster_means(z, torch.tensor([0, 0, 0]), 2, d2=torch.tensor([0.0, 1.0, 81.0]))
    assert means.flatten().tolist() == pytest.approx([10 / 3, 9.0])


def test_seeds_are_different_points_of_the_data() -> None:
    z, _ = blobs()
    seeds = plus_plus(z, 4, torch.Generator().manual_seed(0))
    assert len(torch.unique(seeds, dim=0)) == 4 and all((z == seed).all(1).any() for seed in seeds)


def test_fewer_distinct_points_than_clusters_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(DataError, match=r"method\.n_clusters is 3, but the 10 images have only 2"):
        kmeans(torch.tensor([[0.0], [1.0]]).repeat(5, 1), 3, 0)


def test_one_cluster_is_the_mean() -> None:
    z = torch.randn(20, 3)
    assert torch.allclose(kmeans(z, 1, 0).centroids[0], z.mean(0), atol=1e-5)
