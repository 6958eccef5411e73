from __future__ import annotations

import numpy as np
import pytest

from trainer.metric import effective_clusters, occupancy, score_labels, silhouette


def test_a_renamed_perfect_clustering_scores_one() -> None:
    scores = score_labels(np.array([0, 0, 1, 1, 2, 2]), np.array([2, 2, 0, 0, 1, 1]))
    assert (scores.acc, scores.nmi, scores.ari, scores.purity) == pytest.approx((1.0, 1.0, 1.0, 1.0))


def test_accuracy_by_hand() -> None:
    # Cluster 0 holds classes 0, 0, 1; cluster 1 holds 1, 1, 0: the best map gets 4 of 6.
    assert score_labels(np.array([0, 0, 1, 1, 1, 0]), np.array([0, 0, 0, 1, 1, 1])).acc == pytest.approx(4 / 6)


def test_one_cluster_per_image_is_pure_but_not_accurate() -> None:
    scores = score_labels(np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3]))
    assert (scores.purity, scores.acc) == (1.0, 0.5)


def test_effective_clusters_is_k_when_even_and_one_when_all_are_in_one() -> None:
    assert effective_clusters(np.array([5.0, 5.0, 5.0])) == pytest.approx(3.0)
    assert effective_clusters(np.array([15.0, 0.0, 0.0])) == pytest.approx(1.0)


def test_occupancy_counts_empty_clusters_too() -> None:
    assert occupancy(np.array([0, 0, 2]), 4).tolist() == [2, 0, 1, 0]


def test_silhouette_of_one_cluster_is_none() -> None:
    assert silhouette(np.zeros((4, 2), np.float32), np.zeros(4, np.int64)) is None


def test_silhouette_of_a_cluster_too_rare_to_be_drawn_is_none_and_no_error() -> None:
    z = np.random.default_rng(0).normal(size=(6000, 2)).astype(np.float32)
    ids = np.zeros(6000, np.int64)
    ids[0] = 1
    assert silhouette(z, ids, sample=10) is None
