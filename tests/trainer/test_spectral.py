from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch import Tensor

from tests.trainer.embeddings import strips
from tests.trainer.learning import KINDS, blob_learner, warped_blobs
from trainer.clustering import spectral
from trainer.clustering.kmeans import KMeansOptions, kmeans
from trainer.clustering.spectral import Cut, leading_eigenvectors, neighbour_graph, normalised_cut, spectral_clustering
from trainer.distance import nearest, squared_distances
from trainer.errors import CollapseError, DataError
from trainer.methods.dec import DEC, DECSettings
from trainer.metric import score_labels


def test_a_cut_by_hand() -> None:
    # Two pairs of weight 3, joined by an edge of 1; every point has 1 to itself.
    weights = csr_array(np.array([[1.0, 3, 0, 0], [3, 1, 1, 0], [0, 1, 1, 3], [0, 0, 3, 1]]))
    assert normalised_cut(weights, np.array([0, 0, 1, 1]), 2) == pytest.approx(2 * (1 - 8 / 9))
    assert normalised_cut(weights, np.array([0, 1, 0, 1]), 2) == pytest.approx((1 - 2 / 9) + (1 - 2 / 9))
    assert normalised_cut(weights, np.zeros(4, np.int64), 2) == 1.0  # the empty cluster counts as wholly cut


def test_eigenvectors_are_those_of_the_normalised_weights_by_hand() -> None:
    weights = csr_array(np.array([[2.0, 2, 0], [2, 2, 0], [0, 0, 1]]))
    found = leading_eigenvectors(weights, 2, 0)  # two parts without an edge between them: eigenvalue 1 twice
    assert np.allclose(np.abs(found[:2] @ found[2]), 0, atol=1e-12)
    assert np.allclose(found[0], found[1])


def test_spectral_clustering_finds_strips_that_k_means_cuts() -> None:
    z, truth = strips()
    assert score_labels(truth.numpy(), kmeans(z, 2, 0).labels.numpy()).acc < 0.7  # control: there is something to gain
    found = cut_of(z, 2)
    assert score_labels(truth.numpy(), found.labels.numpy()).acc == 1.0
    assert found.cut < 0.01


def test_the_smallest_cut_of_all_numbers_of_eigenvectors_is_kept() -> None:
    z = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))  # no clusters: every number gives another cut
    weights = neighbour_graph(z, 15)
    cuts = {}
    for count in range(6, 13):
        rows = torch.nn.functional.normalize(
            torch.from_numpy(leading_eigenvectors(weights, 12, 0)[:, :count].copy()).float(), dim=1
        )
        cuts[count] = normalised_cut(weights, kmeans(rows, 6, 0, KMeansOptions(n_init=3)).labels.numpy(), 6)
    found = cut_of(z, 6, n_init=3)
    assert found.cut == pytest.approx(min(cuts.values()))
    assert cuts[found.eigenvectors] == pytest.approx(found.cut)
    assert max(cuts.values()) > found.cut  # control: they are not all alike


def test_many_points_by_lobpcg_get_the_assignment_of_all_eigenvectors_and_the_same_one_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, _ = warped_blobs(per_kind=40)
    z = torch.from_numpy(images.reshape(len(images), -1) - 127.5)
    every = cut_of(z, KINDS)
    monkeypatch.setattr(spectral, "DENSE", 10)
    first, second = cut_of(z, KINDS), cut_of(z, KINDS)
    assert torch.equal(first.labels, second.labels)
    assert first.cut == second.cut
    assert first.cut == pytest.approx(every.cut, abs=1e-9)
    assert score_labels(every.labels.numpy(), first.labels.numpy()).acc == 1.0
    assert every.cut == 0.0  # the graph falls into five parts: five equal eigenvalues, of which Lanczos misses some


@pytest.mark.parametrize("frames", [10, 20, 40])
def test_bursts_of_alike_frames_are_no_clusters_of_their_own(frames: int) -> None:
    # Four kinds of ten parts, each filmed in many frames that differ by noise alone: 15 neighbours of a frame are all of its own part.
    z, truth = bursts(frames)
    found = cut_of(z, 4)
    assert score_labels(truth.numpy(), found.labels.numpy()).acc == 1.0


@pytest.mark.parametrize("frames", [20, 40, 80])
def test_two_bursts_among_ordinary_samples_are_no_clusters(frames: int) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(4).repeat_interleave(375)
    kinds = 6 * torch.eye(4, 16)[truth] + torch.randn(1500, 16, generator=generator)
    filmed = kinds[[0, 400]].repeat_interleave(frames, 0) + 0.001 * torch.randn(2 * frames, 16, generator=generator)
    found = cut_of(torch.cat([kinds, filmed]), 4)
    assert score_labels(truth.numpy(), found.labels[:1500].numpy()).acc > 0.98


def test_more_groups_than_clusters_have_no_cut_and_the_method_says_that_it_started_from_k_means(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    z = 10 * torch.eye(6).repeat_interleave(130, 0) + 0.1 * torch.randn(
        780, 6, generator=torch.Generator().manual_seed(0)
    )
    assert spectral_clustering(z, 5, 0, n_init=3) is None
    method = method_on(z, monkeypatch, 5, "spectral")
    assert "centroids started from k-means" in method.warnings()[0]
    assert torch.equal(method.learner.model.centroids, method_on(z, monkeypatch, 5, "kmeans").learner.model.centroids)
    again = DEC(DECSettings(n_clusters=5), method.learner, 16)
    again.load_state(method.state())
    assert again.warnings() == method.warnings()  # a resumed run says it too
    assert method_on(z, monkeypatch, 6, "spectral").warnings() == []  # control


def cut_of(z: Tensor, n_clusters: int, n_init: int = 20) -> Cut:
    found = spectral_clustering(z, n_clusters, 0, n_init)
    assert found is not None
    return found


def bursts(frames: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = 10 * torch.eye(4).repeat_interleave(10, 0) + torch.randn(40, 4, generator=generator)
    noise = 0.001 * torch.randn(40 * frames, 4, generator=generator)
    return parts.repeat_interleave(frames, 0) + noise, torch.arange(4).repeat_interleave(10 * frames)


@pytest.mark.parametrize(("kinds", "each"), [(2, 4), (2, 8), (5, 3), (10, 4)])
def test_few_images_are_enough(kinds: int, each: int) -> None:
    generator = torch.Generator().manual_seed(0)
    z = 10 * torch.eye(kinds).repeat_interleave(each, 0) + torch.randn(kinds * each, kinds, generator=generator)
    truth = torch.arange(kinds).repeat_interleave(each)
    assert score_labels(truth.numpy(), cut_of(z, kinds).labels.numpy()).acc == 1.0


def test_an_embedding_of_one_dimension_has_clusters_too() -> None:
    z = torch.arange(5.0).repeat_interleave(40)[:, None] + 0.01 * torch.rand(
        200, 1, generator=torch.Generator().manual_seed(0)
    )
    truth = torch.arange(5).repeat_interleave(40)
    assert score_labels(truth.numpy(), cut_of(z, 5).labels.numpy()).acc == 1.0


def method_on(z: Tensor, monkeypatch: pytest.MonkeyPatch, n_clusters: int, init: str) -> DEC:
    """DEC with its initial centroids, on a learner whose embeddings are z (N, 6)."""
    learner = blob_learner()
    learner.model.centroids = torch.nn.Parameter(torch.zeros(n_clusters, 6))
    monkeypatch.setattr(learner, "all_latents", lambda: z)
    method = DEC(DECSettings.model_validate({"n_clusters": n_clusters, "init": init}), learner, 16)
    method.init_centroids()
    return method


@pytest.mark.parametrize(
    ("init", "at_most", "low", "high"),
    [("spectral", 10**6, 0.95, 1), ("spectral", 100, 0.9, 1), ("kmeans", 0, 0.5, 0.7)],
)
def test_a_method_starts_from_centroids_that_reproduce_the_cut_where_k_means_does_not(
    init: str, at_most: int, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.methods.trained.MAX_GRAPH", at_most)
    z, truth = strips()
    z = torch.nn.functional.pad(z, (0, 3))
    method = method_on(z, monkeypatch, 2, init)
    answers = nearest(z, method.learner.model.centroids)[0]
    assert low <= score_labels(truth.numpy(), answers.numpy()).acc <= high


def test_random_centroids_are_different_samples_where_most_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.cat([1e-7 * torch.randn(400, 6, generator=generator), torch.eye(6)])
    mu = method_on(z, monkeypatch, 5, "random").learner.model.centroids.detach()
    assert torch.pdist(mu).min() > 0.5
    assert torch.equal(squared_distances(mu, z).min(1).values, torch.zeros(5))


@pytest.mark.parametrize("init", ["kmeans", "spectral", "random"])
def test_embeddings_that_are_not_finite_are_not_blamed_on_the_images(init: str) -> None:
    learner = blob_learner()
    with torch.no_grad():
        next(learner.model.encoder.parameters())[0, 0] = torch.nan
    with pytest.raises(CollapseError, match="guard nan"):
        DEC(DECSettings.model_validate({"n_clusters": KINDS, "init": init}), learner, 16).init_centroids()


def test_as_many_clusters_as_points_are_single_points() -> None:
    z = torch.eye(4)
    assert sorted(cut_of(z, 4).labels.tolist()) == [0, 1, 2, 3]


def test_frames_of_a_camera_that_hangs_change_no_cut() -> None:
    z, _ = strips()
    found = cut_of(torch.cat([z, z[:1].repeat(500, 1)]), 2)
    alone = cut_of(z, 2)
    assert found.cut == pytest.approx(alone.cut)
    assert torch.equal(found.labels[:300], alone.labels)
    assert torch.equal(found.labels[300:], alone.labels[:1].repeat(500))


def test_more_clusters_than_different_images_are_refused() -> None:
    with pytest.raises(DataError, match=r"n_clusters is 3, but the 40 images have only 2 different embeddings"):
        spectral_clustering(torch.eye(2).repeat(20, 1), 3, 0)


def test_random_centroids_need_as_many_different_images(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"n_clusters is 3, but the 40 images have only 2 different embeddings"):
        method_on(torch.eye(2, 6).repeat(20, 1), monkeypatch, 3, "random")
