"""k-means by Lloyd's iterations in torch, on whatever device the embeddings lie; every method initialises or ends with it.

Sources: Lloyd 1982; Arthur and Vassilvitskii, "k-means++", 2007 (greedy variant: the best of a few candidates, as scikit-learn does).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.distance import nearest, squared_distances_matmul
from trainer.errors import DataError


@dataclass(frozen=True)
class KMeansResult:
    """`centroids` (K, D), `labels` (N,), `inertia` = sum of squared distances, `iterations` of the best restart."""

    centroids: Tensor
    labels: Tensor
    inertia: float
    iterations: int


@dataclass(frozen=True)
class KMeansOptions:
    """`n_init` restarts keep the lowest inertia. Stops when no label changes, or the centroids move less than `tol` x variance."""

    n_init: int = 20
    max_iterations: int = 300
    tol: float = 1e-4


def kmeans(
    z: Tensor, n_clusters: int, seed: int, options: KMeansOptions | None = None, init: Tensor | None = None
) -> KMeansResult:
    """Clusters z (N, D) into `n_clusters`.

    Args:
        seed: decides the initial centroids; the same seed gives the same result on a CPU.
        init: (K, D) centroids to start from; then there is one run and no restart.

    Raises:
        DataError: fewer distinct points than clusters.
    """
    options = options or KMeansOptions()
    z = z.detach().float()
    distinct = len(torch.unique(z, dim=0)) if len(z) <= 20_000 else n_clusters
    if distinct < n_clusters:
        raise DataError(
            f"method.n_clusters is {n_clusters}, but the {len(z)} images have only {distinct} different embeddings; "
            f"use fewer clusters or more images"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = [init] if init is not None else (plus_plus(z, n_clusters, generator) for _ in range(options.n_init))
    results = (_lloyd(z, start.to(z), options) for start in starts)
    return min(results, key=lambda result: result.inertia)


def plus_plus(z: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ seeding: (K, D)."""
    n, candidates = len(z), 2 + int(math.log(n_clusters))
    chosen = [int(torch.randint(n, (1,), generator=generator))]
    best = (z - z[chosen[0]]).square().sum(1)
    for _ in range(n_clusters - 1):
        cumulative = best.double().cumsum(0).cpu()
        picks = torch.searchsorted(
            cumulative, torch.rand(candidates, generator=generator, dtype=torch.float64) * cumulative[-1]
        ).clamp(max=n - 1)
        d2 = torch.minimum(squared_distances_matmul(z[picks.to(z.device)], z, z.mean(0)), best)  # (candidates, N)
        winner = int(d2.sum(1).argmin())
        chosen.append(int(picks[winner]))
        best = (z - z[chosen[-1]]).square().sum(1).minimum(best)
    return z[torch.tensor(chosen, device=z.device)].clone()


def _lloyd(z: Tensor, mu: Tensor, options: KMeansOptions) -> KMeansResult:
    labels, d2 = nearest(z, mu)
    limit = options.tol * float(z.var(0, unbiased=False).mean()) if len(z) > 1 else 0.0
    iteration = 0
    while iteration < options.max_iterations:
        iteration += 1
        moved = cluster_means(z, labels, len(mu), d2)
        shift = float((moved - mu).square().sum())
        mu, previous = moved, labels
        labels, d2 = nearest(z, mu)
        if shift <= limit or torch.equal(labels, previous):
            break
    return KMeansResult(mu, labels, float(d2.double().sum()), iteration)


def cluster_means(z: Tensor, labels: Tensor, n_clusters: int, d2: Tensor | None = None) -> Tensor:
    """Means (K, D) of the members; an empty cluster is re-seeded at the point farthest from its own centroid (`d2`), one each."""
    counts = torch.bincount(labels, minlength=n_clusters)
    sums = torch.zeros(n_clusters, z.shape[1], dtype=torch.float64, device=z.device).index_add_(0, labels, z.double())
    means = (sums / counts.clamp_min(1)[:, None]).to(z.dtype)
    empty = torch.nonzero(counts == 0)[:, 0]
    if len(empty) and d2 is not None:
        means[empty] = z[torch.topk(d2, min(len(empty), len(d2))).indices][: len(empty)]
    return means
