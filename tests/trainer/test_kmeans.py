from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from trainer.clustering.engine import Engine, build_assign, chosen_engine
from trainer.clustering.kmeans import KMeansOptions, cluster_means, kmeans, plus_plus
from trainer.distance import nearest
from trainer.errors import DataError

ENGINES = ("torch", pytest.param("faiss", marks=pytest.mark.skipif(find_spec("faiss") is None, reason="no faiss-cpu")))


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


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_gives_equal_arrays_for_equal_seeds_and_the_labels_of_nearest(engine: Engine) -> None:
    z = torch.randn(3000, 16, generator=torch.Generator().manual_seed(4)) + 50
    options = KMeansOptions(n_init=3, engine=engine)
    first, second = kmeans(z, 9, 5, options), kmeans(z, 9, 5, options)
    assert torch.equal(first.centroids, second.centroids) and torch.equal(first.labels, second.labels)
    assert torch.equal(first.labels, nearest(z, first.centroids)[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_reaches_the_same_inertia(engine: Engine) -> None:
    z = torch.randn(4000, 12, generator=torch.Generator().manual_seed(5))
    z = z + 4 * torch.randn(8, 12, generator=torch.Generator().manual_seed(6))[torch.arange(4000) % 8]
    reference = kmeans(z, 8, 0, KMeansOptions(engine="torch"))
    assert kmeans(z, 8, 0, KMeansOptions(engine=engine)).inertia == pytest.approx(reference.inertia, rel=1e-3)
    assert kmeans(z, 7, 0, KMeansOptions(engine=engine)).inertia > 1.1 * reference.inertia  # control: it can differ


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_assigns_as_a_slow_loop_does(engine: Engine) -> None:
    z, mu = torch.tensor([[0.0], [4.0], [9.0]]), torch.tensor([[1.0], [8.0]])
    ids, d2 = build_assign(z, 2, engine)(mu)
    assert ids.tolist() == [0, 0, 1] and d2.tolist() == [1.0, 9.0, 1.0]


def test_auto_takes_torch_for_few_clusters() -> None:
    assert chosen_engine(torch.zeros(70_000, 10), 10, "auto") == "torch"


def test_an_engine_that_is_not_there_is_an_error_that_says_so() -> None:
    with pytest.raises(DataError, match="engine is faiss, but the points lie on meta"):
        chosen_engine(torch.zeros(2, 2, device="meta"), 1, "faiss")


def test_spherical_centroids_have_unit_length_and_ignore_the_points_lengths() -> None:
    z = torch.tensor([[1.0, 0.1], [30.0, -3.0], [0.1, 2.0], [-0.2, 4.0]])
    result = kmeans(z, 2, 0, KMeansOptions(spherical=True))
    assert torch.allclose(result.centroids.norm(dim=1), torch.ones(2), atol=1e-6)
    assert result.labels[0] == result.labels[1] != result.labels[2] == result.labels[3]
    assert (
        kmeans(z, 2, 0).labels.tolist().count(int(kmeans(z, 2, 0).labels[1])) == 1
    )  # control: lengths decide otherwise


def test_random_initial_centroids_find_blobs_with_enough_restarts() -> None:
    z, truth = blobs()
    labels = kmeans(z, 4, 0, KMeansOptions(n_init=20, init="random")).labels
    assert len({(int(a), int(b)) for a, b in zip(labels, truth, strict=True)}) == 4


def test_a_centroid_far_from_all_points_gets_members_again() -> None:
    z, _ = blobs()
    result = kmeans(z, 4, 0, init=torch.cat([z[[0, 30, 60]], torch.full((1, 5), 1e3)]))
    assert (torch.bincount(result.labels, minlength=4) == 30).all()


def test_duplicates_beyond_the_first_thousand_rows_still_count_as_distinct() -> None:
    z = torch.cat([torch.zeros(1500, 2), torch.ones(5, 2)])
    assert kmeans(z, 2, 0).centroids.sort(0).values.tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_the_points_are_left_as_they_are() -> None:
    z, _ = blobs()
    before = z.clone()
    kmeans(z, 4, 0, KMeansOptions(spherical=True))
    assert torch.equal(z, before)
