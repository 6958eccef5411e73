"""k-means again on embeddings that have moved: from the last centroids and from new seeds, the best run in the last one's order."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from trainer.clustering.kmeans import KMeansOptions, kmeans
from trainer.clustering.matching import match
from trainer.clustering.mini_batch import MiniBatchOptions, mini_batch_kmeans

Algorithm = Literal["kmeans", "mini_batch"]


def recluster(z: Tensor, mu: Tensor, seed: int, restarts: int, algorithm: Algorithm = "kmeans") -> Tensor:
    """Centroids (K, D) of z (N, D), row by row near the last ones `mu` (K, D).

    Args:
        restarts: runs from new seeds beside the warm one; the lowest inertia wins, so ids stay but a better clustering is taken.
    """
    mu = mu.detach()
    if algorithm == "mini_batch":
        results = [mini_batch_kmeans(z, len(mu), seed, init=mu)]
        results += [mini_batch_kmeans(z, len(mu), seed, MiniBatchOptions(n_init=restarts))] if restarts else []
    else:
        results = [kmeans(z, len(mu), seed, init=mu)]
        results += [kmeans(z, len(mu), seed, KMeansOptions(n_init=restarts))] if restarts else []
    found = min(results, key=lambda result: result.inertia).centroids
    return found[match(mu, found)]
