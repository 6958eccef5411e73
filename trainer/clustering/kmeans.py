"""k-means by Lloyd's iterations, on whatever device the embeddings lie; every method initialises or ends with it.

Sources: Lloyd 1982; Arthur and Vassilvitskii, "k-means++", 2007 (greedy variant: the best of a few candidates, as scikit-learn does);
Dhillon and Modha, "Concept decompositions", 2001, for the spherical one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.clustering.engine import Assign, Engine, build_assign
from trainer.distance import nearest, squared_distances_matmul
from trainer.errors import DataError

FEW = 1000  # rows that nearly always show enough distinct points, before all rows are looked at


@dataclass(frozen=True)
class KMeansResult:
    """`centroids` (K, D), `labels` (N,), `inertia` = sum of squared distances, `iterations` of the best restart."""

    centroids: Tensor
    labels: Tensor
    inertia: float
    iterations: int


@dataclass(frozen=True)
class KMeansOptions:
    """`n_init` restarts keep the lowest inertia. Stops when no label changes, or the centroids move less than `tol` x variance.

    `spherical`: points and centroids have unit length. `init`: k-means++ or points drawn at random. `engine`: of the iterations.
    """

    n_init: int = 20
    max_iterations: int = 300
    tol: float = 1e-4
    init: Literal["++", "random"] = "++"
    spherical: bool = False
    engine: Engine = "auto"


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
    if options.spherical:
        z = torch.nn.functional.normalize(z, dim=1)
    check_distinct(z, n_clusters)
    # Unit-length centroids need the true origin; all others are found around the mean, where the expanded form cancels least.
    centre = torch.zeros_like(z[0]) if options.spherical else z.mean(0)
    centred = z - centre
    wide = centred.double()  # sums over many points; converted once, not per iteration
    assign = build_assign(centred, n_clusters, options.engine)
    generator = torch.Generator().manual_seed(seed)
    if init is not None:
        starts = iter([init.detach().to(z) - centre])
    else:
        starts = (seeding(centred, n_clusters, generator, options.init) for _ in range(options.n_init))
    best = min((_lloyd(wide, start.double(), assign, options) for start in starts), key=lambda found: found.inertia)
    centroids = (best.centroids + centre).to(z.dtype)
    labels, d2 = nearest(z, centroids)  # as every later assignment is made
    return KMeansResult(centroids, labels, float(d2.double().sum()), best.iterations)


def check_distinct(z: Tensor, n_clusters: int) -> None:
    """Refuses points z (N, D) of which fewer than `n_clusters` are different.

    Raises:
        DataError: so it is; the text names method.n_clusters.
    """
    if (distinct := distinct_rows(z, n_clusters)) >= n_clusters:
        return
    raise DataError(
        f"method.n_clusters is {n_clusters}, but the {len(z)} images have only {distinct} different embeddings; "
        f"use fewer clusters or more images"
    )


def distinct_rows(z: Tensor, enough: int) -> int:
    """Number of different rows of z (N, D); at least `enough` where the first FEW show as many already, which saves sorting the rest."""
    few = len(torch.unique(z[:FEW], dim=0))
    return few if few >= enough else len(torch.unique(z, dim=0))


def seeding(z: Tensor, n_clusters: int, generator: torch.Generator, kind: Literal["++", "random"]) -> Tensor:
    """Initial centroids (K, D), points of z (N, D)."""
    if kind == "random":
        return z[torch.randperm(len(z), generator=generator)[:n_clusters].to(z.device)].clone()
    return plus_plus(z, n_clusters, generator)


def plus_plus(z: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ seeding: (K, D)."""
    n, candidates = len(z), 2 + int(math.log(n_clusters))
    centred = z - z.mean(0)
    origin = torch.zeros_like(z[0])
    chosen = [int(torch.randint(n, (1,), generator=generator))]
    best = (z - z[chosen[0]]).square().sum(1)
    for _ in range(n_clusters - 1):
        cumulative = best.double().cpu().cumsum(0)
        picks = torch.searchsorted(
            cumulative, torch.rand(candidates, generator=generator, dtype=torch.float64) * cumulative[-1]
        ).clamp(max=n - 1)
        d2 = torch.minimum(squared_distances_matmul(centred[picks.to(z.device)], centred, origin), best)
        winner = int(d2.sum(1).argmin())  # of d2 (candidates, N)
        chosen.append(int(picks[winner]))
        # Direct form: a duplicate of a seed must be at exactly 0.
        best = (z - z[chosen[-1]]).square().sum(1).minimum(best)
    return z[torch.tensor(chosen, device=z.device)].clone()


def _lloyd(z: Tensor, mu: Tensor, assign: Assign, options: KMeansOptions) -> KMeansResult:
    """One run from mu (K, D); z and mu are float64, `assign` knows the same points as float32."""
    if options.spherical:
        mu = torch.nn.functional.normalize(mu, dim=1)
    labels, d2 = assign(mu)
    limit = options.tol * float(z.var(0, unbiased=False).mean()) if len(z) > 1 else 0.0
    iteration = 0
    while iteration < options.max_iterations:
        iteration += 1
        moved = cluster_means(z, labels, len(mu), d2)
        if options.spherical:
            moved = torch.nn.functional.normalize(moved, dim=1)
        shift = float((moved - mu).square().sum())
        mu, previous = moved, labels
        labels, d2 = assign(mu)
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
