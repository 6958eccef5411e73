"""k-means by Lloyd's iterations, on whatever device the embeddings lie; every method initialises or ends with it.

Memory beside z (N, D) float32, which stays as it is: one centred copy, 4 N D bytes, and for each point 8 + 8 bytes of labels (now and
before), 4 + 4 of distances and squares; everything else goes in chunks. N = 10 M, D = 128: 5.1 GB of z, 5.1 GB of its copy, 0.3 GB, and on a
GPU 1.6 GB of chunks. Several processes share the work on points that all of them have: each assigns and sums its part. k-means++ on very
many points looks at a random sample of them, at least 8 for each cluster (`seeding_points`).

Sources: Lloyd 1982; Arthur and Vassilvitskii, "k-means++", 2007 (greedy variant: the best of a few candidates, as scikit-learn does);
Dhillon and Modha, "Concept decompositions", 2001, for the spherical one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from trainer import ranks
from trainer.clustering.engine import Engine, build_assign
from trainer.distance import nearest
from trainer.errors import DataError

FEW = 1000  # rows that nearly always show enough distinct points, before all rows are looked at
SUM_CHUNK_CPU, SUM_CHUNK_GPU = 1 << 20, 1 << 26  # values that are widened to float64 at once
KEPT_WIDE = 1 << 24  # and up to which they stay so, instead of being widened in every iteration
SQUARE_CHUNK = 1 << 17  # values of z in a pass of k-means++, on a CPU
# k-means++ passes over its points K times: beyond either, it looks at a sample.
SEEDING_PRODUCTS = 1 << 30  # N x K
SEEDING_VALUES = 1 << 27  # N x D
SEEDING_POINTS = 8  # per cluster, at least
SHARED_FROM = 10**8  # N x K x D: about 5 ms of one core; with less, the first of several processes does it for all


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
    options, together = options or KMeansOptions(), ranks.current()
    z = z.detach().float()
    if together.are_many and z.numel() * n_clusters < SHARED_FROM:
        # The very result of one process: of restarts that end alike, the last digit of a sum chooses.
        return together.same(lambda: kmeans(z, n_clusters, seed, options, init))
    if options.spherical:
        z = torch.nn.functional.normalize(z, dim=1)
    check_distinct(z, n_clusters)
    points = _Points(z, n_clusters, options)
    generator = torch.Generator().manual_seed(seed)
    begun = None if init is None else init.detach().to(z) - points.centre
    runs = options.n_init if begun is None else 1
    starts = (points.seeds(generator) if begun is None else begun for _ in range(runs))
    mu, _, iterations = min((_lloyd(points, start.double(), options) for start in starts), key=lambda found: found[1])
    return points.result((mu + points.centre).to(z.dtype), iterations)


def check_distinct(z: Tensor, n_clusters: int) -> None:
    """Refuses points z (N, D) of which fewer than `n_clusters` are different.

    Raises:
        DataError: so it is; the text names method.n_clusters.
    """
    if (distinct := distinct_rows(z, n_clusters)) < n_clusters:
        raise too_few_different(n_clusters, len(z), distinct)


def too_few_different(n_clusters: int, images: int, distinct: int) -> DataError:
    """What to say of `distinct` different embeddings among those of `images`."""
    return DataError(
        f"method.n_clusters is {n_clusters}, but the {images} images have only {distinct} different embeddings; "
        f"use fewer clusters or more images"
    )


def distinct_rows(z: Tensor, enough: int) -> int:
    """Number of different rows of z (N, D); at least `enough` where the first ones show as many already, which saves sorting the rest."""
    looked_at = max(FEW, 2 * enough)
    while looked_at < len(z):
        if (few := len(torch.unique(z[:looked_at], dim=0))) >= enough:
            return few
        looked_at *= 8
    return len(torch.unique(z, dim=0))


def seeding(z: Tensor, n_clusters: int, generator: torch.Generator, kind: Literal["++", "random"]) -> Tensor:
    """Initial centroids (K, D), points of z (N, D); k-means++ looks at a random sample where all of them are too many."""
    if kind == "random":
        return z[torch.randperm(len(z), generator=generator)[:n_clusters].to(z.device)].clone()
    if (size := seeding_points(len(z), z.shape[1], n_clusters)) < len(z):
        z = z[torch.randperm(len(z), generator=generator)[:size].to(z.device)]
    return plus_plus(z, n_clusters, generator)


def seeding_points(n: int, dim: int, n_clusters: int) -> int:
    """How many of n points k-means++ looks at."""
    if n * n_clusters <= SEEDING_PRODUCTS and n * dim <= SEEDING_VALUES:
        return n
    affordable = min(SEEDING_PRODUCTS // n_clusters, SEEDING_VALUES // max(1, dim))
    return min(n, max(SEEDING_POINTS * n_clusters, affordable))


def plus_plus(z: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ seeding: (K, D)."""
    n, candidates = len(z), 2 + int(math.log(n_clusters))
    centred = z - z.mean(0)
    squares = _squares(centred)
    chosen = [int(torch.randint(n, (1,), generator=generator))]
    best = _squares(z, z[chosen[0]])
    for _ in range(n_clusters - 1):
        cumulative = best.double().cpu().cumsum(0)
        picks = torch.searchsorted(
            cumulative, torch.rand(candidates, generator=generator, dtype=torch.float64) * cumulative[-1]
        ).clamp(max=n - 1)
        here = picks.to(z.device)
        # As squared_distances_matmul, of which two terms stay: (candidates, N).
        d2 = (centred[here] @ centred.T).mul_(-2).add_(squares[here, None]).add_(squares).clamp_min_(0.0)
        winner = int(torch.minimum(d2, best, out=d2).sum(1).argmin())
        chosen.append(int(picks[winner]))
        # Direct form: a duplicate of a seed must be at exactly 0.
        torch.minimum(_squares(z, z[chosen[-1]]), best, out=best)
    return z[torch.tensor(chosen, device=z.device)].clone()


def _squares(z: Tensor, point: Tensor | None = None) -> Tensor:
    """|z - point|^2 (N,) of rows z (N, D), or |z|^2; some rows at a time, which stay in the cache."""
    rows = max(1, SQUARE_CHUNK // max(1, z.shape[1])) if z.device.type == "cpu" else max(1, len(z))
    return torch.cat([(part if point is None else part - point).square().sum(1) for part in z.split(rows)])


class _Points:
    """Points z (N, D), centred; of several processes, each holds the centred form of its part (n, D) and all of them the rest."""

    def __init__(self, z: Tensor, n_clusters: int, options: KMeansOptions) -> None:
        self.z, self.n_clusters, self.options, self.together = z, n_clusters, options, ranks.current()
        # Unit-length centroids need the true origin; all others are found around the mean, where the expanded form cancels least.
        self.centre = torch.zeros_like(z[0]) if options.spherical else self.together.same(lambda: z.mean(0))
        self.part = self.together.part(len(z))
        own = z[self.part]
        self.centred = own if options.spherical else own - self.centre
        self.wide = self.centred.double() if z.numel() <= KEPT_WIDE else self.centred  # for sums
        self.assign = build_assign(self.centred, n_clusters, options.engine)

    def seeds(self, generator: torch.Generator) -> Tensor:
        """Initial centroids (K, D), around the centre; of several processes, the first one finds them."""
        return self.together.same(lambda: self._seeds(generator))

    def _seeds(self, generator: torch.Generator) -> Tensor:
        centred = self.centred if len(self.centred) == len(self.z) else self.z - self.centre
        return seeding(centred, self.n_clusters, generator, self.options.init)

    def means(self, labels: Tensor, d2: Tensor) -> Tensor:
        """Means (K, D) in float64 of the members, as `cluster_means`, from labels and d2 of the part."""
        sums, counts = member_sums(self.wide, labels, self.n_clusters)
        self.together.total(sums)
        self.together.total(counts)
        means = sums / counts.clamp_min(1)[:, None]
        empty = torch.nonzero(counts == 0)[:, 0]
        if len(empty):
            d2 = self.together.join(d2, len(self.z))
            far = self.z[torch.topk(d2, min(len(empty), len(d2))).indices] - self.centre
            means[empty] = far.double()
        return means

    @cached_property
    def variance(self) -> float:
        """Mean variance of a coordinate."""
        if len(self.z) < 2:
            return 0.0
        if len(self.wide) == len(self.z) and self.wide.dtype == torch.float64:
            return float(self.wide.var(0, unbiased=False).mean())
        sums = torch.zeros(2, self.z.shape[1], dtype=torch.float64, device=self.z.device)
        for rows in _wide(self.centred):
            sums += torch.stack([rows.sum(0), rows.square().sum(0)])
        mean, square = self.together.total(sums) / len(self.z)
        return float((square - mean.square()).mean())

    def all_equal(self, labels: Tensor, previous: Tensor) -> bool:
        """Whether no label has changed, in any part."""
        changed = torch.tensor([float(not torch.equal(labels, previous))], device=labels.device)
        return float(self.together.total(changed)) == 0

    def total(self, d2: Tensor) -> float:
        """Sum over all points of what is known of the part."""
        return float(self.together.total(d2.double().sum()))

    def result(self, centroids: Tensor, iterations: int) -> KMeansResult:
        """Labels as every later assignment is made."""
        labels, d2 = nearest(self.z[self.part], centroids)
        return KMeansResult(centroids, self.together.join(labels, len(self.z)), self.total(d2), iterations)


def _lloyd(points: _Points, mu: Tensor, options: KMeansOptions) -> tuple[Tensor, float, int]:
    """One run from mu (K, D), float64: centroids, inertia and number of iterations."""
    if options.spherical:
        mu = torch.nn.functional.normalize(mu, dim=1)
    labels, d2 = points.assign(mu)
    iteration, limit = 0, options.tol * points.variance
    while iteration < options.max_iterations:
        iteration += 1
        moved = points.means(labels, d2)
        if options.spherical:
            moved = torch.nn.functional.normalize(moved, dim=1)
        shift = float((moved - mu).square().sum())
        mu, previous = moved, labels
        labels, d2 = points.assign(mu)
        if shift <= limit or points.all_equal(labels, previous):
            break
    return mu, points.total(d2), iteration


def cluster_means(z: Tensor, labels: Tensor, n_clusters: int, d2: Tensor | None = None) -> Tensor:
    """Means (K, D) of the members; an empty cluster is re-seeded at the point farthest from its own centroid (`d2`), one each."""
    sums, counts = member_sums(z, labels, n_clusters)
    means = (sums / counts.clamp_min(1)[:, None]).to(z.dtype)
    empty = torch.nonzero(counts == 0)[:, 0]
    if len(empty) and d2 is not None:
        means[empty] = z[torch.topk(d2, min(len(empty), len(d2))).indices][: len(empty)]
    return means


def member_sums(z: Tensor, labels: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Sums (K, D) and numbers (K,) of the members among z (N, D), float64."""
    sums = torch.zeros(n_clusters, z.shape[1], dtype=torch.float64, device=z.device)
    first = 0
    for rows in _wide(z):
        add_rows(sums, labels[first : first + len(rows)], rows)
        first += len(rows)
    return sums, torch.bincount(labels, minlength=n_clusters).double()


def add_rows(sums: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Adds each of rows (N, D) to the sum (K, D) that its label names, in place; on a CPU one after the other, in their order."""
    if sums.device.type == "cpu":
        # The same sums to the bit; index_add_ with two threads takes four to forty times as long.
        return sums.index_put_((labels,), rows, accumulate=True)
    return sums.index_add_(0, labels, rows)


def _wide(z: Tensor) -> Iterator[Tensor]:
    """Rows of z (N, D) as float64, some at a time."""
    values = SUM_CHUNK_CPU if z.device.type == "cpu" else SUM_CHUNK_GPU
    for rows in z.split(max(1, values // max(1, z.shape[1]))):
        yield rows.double()
