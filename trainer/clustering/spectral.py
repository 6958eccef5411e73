"""Normalised cuts of the graph of shared nearest neighbours: an assignment whose clusters may have any shape.

Sources: Shi and Malik, "Normalized cuts and image segmentation", 2000, of K parts (the objective); Ng, Jordan, Weiss, "On spectral
clustering", NIPS 2001 (the relaxation: rows of the leading eigenvectors of D^-1/2 W D^-1/2, of unit length, and k-means).

    cut = sum_k (1 - w_kk / w_k),   w_kk: weight inside cluster k, w_k: weight that ends in it; 0 where no edge leaves a cluster, K - 1 at random

Differs from them: W is the symmetric part of clustering/smoothing.py's weights, among neighbours by Euclidean distance; k-means runs on
several numbers of eigenvectors from K to 2 K, and the assignment of the smallest cut is kept. With just K of them, one that separates a
handful of outliers leaves two clusters joined. Many frames of one shot are each other's only neighbours: cutting them off costs nothing,
and tells nothing. So an assignment with a cluster below a quarter of the even share is not taken, nor a graph in more than K
parts; it grows then, to twice as many neighbours at a time. The price: a kind as rare as that is not found here.
`init: spectral` starts a method from it, since k-means does not see that two clusters in the embedding of an autoencoder are bent.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import lobpcg
from torch import Tensor

from trainer.clustering.kmeans import KMeansOptions, kmeans, too_few_different
from trainer.clustering.neighbours import neighbours_within
from trainer.clustering.smoothing import SmoothingOptions, distinct, marks, shared_neighbour_weights

DENSE = 1000  # points up to which all eigenvectors are computed
COUNTS = 11  # numbers of eigenvectors that are tried, spread from K to 2 K
TOLERANCE = 1e-3  # of an eigenvector's residual: their rows only go into k-means, and the cut has the last word
MAX_ITERATIONS = 300
NEIGHBOURS = SmoothingOptions.neighbours  # of a point at first, itself included; fewer where there are few points
MIN_JACCARD = SmoothingOptions.min_jaccard
SMALL = 0.25  # of the even share N / K: clusters below it are taken for frames of one shot

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Cut:
    """`labels` (N,), their normalised `cut`, and how many `eigenvectors` gave it."""

    labels: Tensor
    cut: float
    eigenvectors: int


def spectral_clustering(z: Tensor, n_clusters: int, seed: int, n_init: int = 20) -> Cut | None:
    """Assigns z (N, D) by the smallest normalised cut that was found; N^2 distances are computed, in pieces. None: no graph gave one.

    Raises:
        DataError: fewer distinct points than clusters.
    """
    points, place = distinct(z)
    if len(points) < n_clusters:
        raise too_few_different(n_clusters, len(z), len(points))
    fewest = min(NEIGHBOURS, max(3, len(points) // (2 * n_clusters)))
    for count in (fewest, 2 * fewest, 4 * fewest, 8 * fewest):
        weights = neighbour_graph(points, count)
        if connected_components(weights, directed=False)[0] <= n_clusters:
            found = _smallest_cut(weights, n_clusters, seed, n_init)
            if found is not None:
                return Cut(found.labels[place].to(z.device), found.cut, found.eigenvectors)
    return None


def _smallest_cut(weights: csr_array, n_clusters: int, seed: int, n_init: int) -> Cut | None:
    """Of the assignments in which no cluster is small; None where each has one."""
    n = weights.shape[0]
    vectors = leading_eigenvectors(weights, min(2 * n_clusters, n), seed)
    tried = []
    for count in np.unique(np.linspace(n_clusters, vectors.shape[1], COUNTS).round().astype(int)).tolist():
        rows = torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(vectors[:, :count])).float(), dim=1)
        labels = kmeans(rows, n_clusters, seed, KMeansOptions(n_init=n_init)).labels
        if torch.bincount(labels, minlength=n_clusters).min() >= SMALL * n / n_clusters:
            tried.append(Cut(labels, normalised_cut(weights, labels.numpy(), n_clusters), count))
    return min(tried, key=lambda found: found.cut, default=None)


def neighbour_graph(points: Tensor, count: int) -> csr_array:
    """Symmetric weights (N, N) of distinct points (N, D) by what they share of their `count` neighbours; every point has one to itself."""
    others = neighbours_within(points, count - 1).ids.cpu().numpy()
    members = marks(np.concatenate([np.arange(len(points))[:, None], others], 1), len(points))
    weights = shared_neighbour_weights(members, members, MIN_JACCARD)
    return csr_array((weights + weights.T) / 2)


def leading_eigenvectors(weights: csr_array, count: int, seed: int) -> NDArray[np.float64]:
    """The `count` eigenvectors (N, count) of D^-1/2 W D^-1/2 with the largest eigenvalues, the largest first."""
    scale = diags_array(1 / np.sqrt(np.asarray(weights.sum(1), np.float64)))
    scaled = csr_array(scale @ weights @ scale)
    n = scaled.shape[0]
    if n <= max(DENSE, 5 * count):  # what lobpcg needs
        values, vectors = np.linalg.eigh(scaled.toarray())
    else:
        # A block of vectors, since Lanczos misses some of the equal eigenvalues of a graph that falls into parts.
        start = np.random.default_rng(seed).random((n, count))
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that some are less exact
            values, vectors = lobpcg(scaled, start, largest=True, tol=TOLERANCE, maxiter=MAX_ITERATIONS)
    return np.asarray(vectors[:, np.argsort(-values)[:count]])


def normalised_cut(weights: csr_array, labels: Labels, n_clusters: int) -> float:
    """`cut` of labels (N,); a cluster without points counts as wholly cut."""
    member = np.eye(n_clusters)[labels]
    inside = np.einsum("nk,nk->k", member, weights @ member)
    ends = member.T @ np.asarray(weights.sum(1))
    return float((1 - np.divide(inside, ends, out=np.zeros(n_clusters), where=ends > 0)).sum())
