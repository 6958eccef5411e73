from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.embeddings import strips
from trainer.clustering.boundary import fit_boundary
from trainer.clustering.kmeans import KMeansOptions, cluster_means, kmeans
from trainer.clustering.smoothing import SmoothingOptions, extend, neighbours, shared_neighbour_weights, smooth
from trainer.distance import nearest
from trainer.learner import Learner
from trainer.methods.smoothed_kmeans import SmoothedKMeans, SmoothedKMeansSettings
from trainer.metric import score_labels


def on_circle(*degrees: float) -> Tensor:
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])


def blobs(k: int = 4, each: int = 60, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    truth = torch.arange(k).repeat_interleave(each)
    return torch.eye(k, 8)[truth] + spread * torch.randn(k * each, 8, generator=generator), truth


class Embeddings:
    """A learner that has these embeddings, and no images."""

    seed = 0

    def __init__(self, z: Tensor, n_clusters: int) -> None:
        self.z = z
        self.model = SimpleNamespace(centroids=torch.nn.Parameter(torch.zeros(n_clusters, z.shape[1])))

    def __len__(self) -> int:
        return len(self.z)

    def all_latents(self) -> Tensor:
        return self.z


def method_on(z: Tensor, n_clusters: int, **settings: float) -> SmoothedKMeans:
    options = SmoothedKMeansSettings.model_validate({"n_clusters": n_clusters, **settings})
    method = SmoothedKMeans(options, cast(Learner, Embeddings(z, n_clusters)), 16)
    method.init_centroids()
    return method


def test_neighbours_by_hand() -> None:
    z = on_circle(0, 10, 25, 100)
    marks = neighbours(z, z, 2).toarray()
    assert marks.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_a_zero_row_has_no_direction_and_is_nobodys_neighbour_before_one_that_points_the_same_way() -> None:
    z = torch.cat([on_circle(0, 70, 80), torch.zeros(1, 2)])
    assert neighbours(z, z, 2).toarray()[:3].tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]  # cos 70 is .34


def test_weights_are_the_jaccard_of_shared_neighbours_by_hand() -> None:
    z = on_circle(0, 10, 25, 100)
    marks = neighbours(z, z, 2)
    # |{0,1} and {1,2}| / |{0,1,2}| = 1/3; {2,3} shares one of three with {1,2} only.
    raw = np.array([[1, 1, 1 / 3, 0], [1, 1, 1 / 3, 0], [1 / 3, 1 / 3, 1, 1 / 3], [0, 0, 1 / 3, 1]])
    weights = shared_neighbour_weights(marks, marks, 0.05).toarray()
    assert np.allclose(weights, raw / raw.sum(1, keepdims=True), atol=1e-6)
    dropped = shared_neighbour_weights(marks, marks, 0.4).toarray()
    assert np.allclose(dropped, [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def test_one_step_by_hand() -> None:
    z = on_circle(0, 10, 25, 100)
    options = SmoothingOptions(neighbours=2, min_jaccard=0.4, steps=1, anchor=0.5)
    mixed = 0.5 * z[0] + 0.5 * (z[0] + z[1]) / 2
    assert np.allclose(smooth(z, options).smoothed[0], mixed / mixed.norm(), atol=1e-6)
    assert np.allclose(smooth(z, options).smoothed[3], z[3], atol=1e-6)  # it shares too little with any other


def test_large_sets_in_chunks_give_the_weights_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    z, _ = blobs()
    marks = neighbours(torch.nn.functional.normalize(z, dim=1), torch.nn.functional.normalize(z, dim=1), 15)
    whole = shared_neighbour_weights(marks, marks, 0.05).toarray()
    monkeypatch.setattr("trainer.clustering.smoothing.CHUNK", 7)
    assert np.array_equal(shared_neighbour_weights(marks, marks, 0.05).toarray(), whole)


def test_frames_of_a_camera_that_hangs_are_one_point_of_the_graph() -> None:
    z, _ = blobs()
    alone, graph = smooth(z, SmoothingOptions()), smooth(torch.cat([z[:1].repeat(500, 1), z]), SmoothingOptions())
    assert graph.members.shape == (len(z), len(z))  # else a weight for each of 500 x 500 pairs
    assert np.allclose(graph.all_smoothed[500:], alone.all_smoothed, atol=1e-5)
    assert np.array_equal(graph.all_smoothed[:500], graph.all_smoothed[500:501].repeat(500, 0))


def test_smoothing_finds_strips_that_k_means_cuts() -> None:
    z, truth = strips()
    smoothed = torch.from_numpy(smooth(z, SmoothingOptions(steps=300, anchor=0.003)).smoothed)
    found = kmeans(smoothed, 2, 0, KMeansOptions(n_init=10)).labels
    assert score_labels(truth.numpy(), kmeans(z, 2, 0).labels.numpy()).acc < 0.7  # control: there is something to gain
    assert score_labels(truth.numpy(), found.numpy()).acc == 1.0


def test_a_point_of_the_graph_extends_to_near_its_smoothed_place() -> None:
    z, _ = blobs()
    graph = smooth(z, SmoothingOptions())
    again = extend(graph, z)
    assert (again * graph.smoothed).sum(1).min() > 0.99
    assert (graph.original * graph.smoothed).sum(1).min() < 0.9  # control: smoothing moved points far


def test_learned_centroids_reproduce_an_assignment_that_class_means_do_not() -> None:
    # One wide class beside a narrow one: the border half-way between the means cuts the wide one.
    z = torch.cat([torch.linspace(-4, 1, 60), torch.linspace(1.2, 1.6, 60)])[:, None]
    labels = torch.arange(2).repeat_interleave(60)
    means = cluster_means(z, labels, 2)
    learned = fit_boundary(z, labels, 2, pull=1e-4)
    assert (nearest(z, means)[0] == labels).double().mean() < 0.9
    assert (nearest(z, learned)[0] == labels).double().mean() > 0.97
    assert torch.equal(fit_boundary(z, labels, 2, pull=float("inf")), means)


def test_a_stronger_pull_keeps_centroids_nearer_to_the_means() -> None:
    z, truth = blobs()
    means = cluster_means(z, truth, 4)
    moved = [float((fit_boundary(z, truth, 4, pull) - means).norm()) for pull in (1.0, 0.1, 0.001)]
    assert moved == sorted(moved) and moved[0] > 0


def test_held_out_parts_get_the_smoothed_cluster_and_it_is_stated() -> None:
    z, truth = blobs()
    method = method_on(z, 4)
    figures = method.figures()
    assert set(figures) == {"agreement", "agreement_rerun", "agreement_means", "agreement_train"}
    assert figures["agreement"] >= 0.95 and figures["agreement_rerun"] >= 0.95 and method.warnings() == []
    ids = nearest(z, method.learner.model.centroids.detach())[0]
    assert score_labels(truth.numpy(), ids.numpy()).acc > 0.95


def test_clusters_that_centroids_cannot_hold_are_warned_of_with_the_figure() -> None:
    noise = torch.randn(300, 8, generator=torch.Generator().manual_seed(2))
    method = method_on(noise, 8)
    assert method.figures()["agreement"] < 0.95
    assert len(method.warnings()) == 1
    assert f"{method.figures()['agreement']:.1%} of held-out parts" in method.warnings()[0]
    assert method_on(noise, 8, min_agreement=0.0).warnings() == []


def test_without_held_out_parts_the_unknown_agreement_is_said() -> None:
    z, _ = blobs()
    method = method_on(z, 4, holdout=0)
    assert "agreement" not in method.figures() and "held no parts out" in method.warnings()[0]


def test_fewer_parts_than_neighbours_work() -> None:
    z, _ = blobs(2, 5)
    assert method_on(z, 2).figures()["agreement_train"] == 1.0
