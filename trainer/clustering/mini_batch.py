"""Mini-batch k-means, for sets that k-means itself takes too long on: a few passes in small batches, then one full assignment.

`MiniBatchStream` is the same in one pass over rows that are not held: of a stream, or of a FeatureStore larger than memory.

Source: Sculley, "Web-scale k-means clustering", 2010, Algorithm 1: v counts a centroid's members so far, eta = 1/v is its learning
rate, mu <- (1 - eta) mu + eta x. Differs from the paper: a batch's members of one centroid are averaged in at once, which is the same
sum; seeding is k-means++ on a sample; after an epoch (but the last) a starved centroid restarts at a far point of the last batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from trainer import ranks
from trainer.clustering.engine import build_assign
from trainer.clustering.kmeans import KMeansResult, add_rows, check_distinct, plus_plus
from trainer.distance import nearest
from trainer.errors import DataError

SEEDING_SAMPLE = 8  # batches that k-means++ looks at
STARVED_SHARE = 0.01  # of N / K members in one epoch: fewer is starved


@dataclass(frozen=True)
class MiniBatchOptions:
    """`n_init` whole runs keep the lowest inertia; every epoch sees all points once, in an order of its own."""

    batch_size: int = 1024
    epochs: int = 10
    n_init: int = 3


def mini_batch_kmeans(
    z: Tensor, n_clusters: int, seed: int, options: MiniBatchOptions | None = None, init: Tensor | None = None
) -> KMeansResult:
    """Clusters z (N, D) into `n_clusters`; `iterations` of the result counts batches.

    Args:
        seed: decides initial centroids and order; the same seed gives the same result on a CPU.
        init: (K, D) centroids to start from; then there is one run and no restart.

    Raises:
        DataError: fewer distinct points than clusters.
    """
    options, together = options or MiniBatchOptions(), ranks.current()
    z = z.detach().float()
    if together.are_many:  # one batch after another: the first process does it for all
        return together.same(lambda: mini_batch_kmeans(z, n_clusters, seed, options, init))
    check_distinct(z, n_clusters)
    generator = torch.Generator().manual_seed(seed)
    runs = 1 if init is not None else options.n_init
    results = []
    for _ in range(runs):
        start = _seeds(z, n_clusters, generator, options) if init is None else init.detach().to(z).clone()
        results.append(_run(z, start, generator, options))
    return min(results, key=lambda result: result.inertia)


def _seeds(z: Tensor, n_clusters: int, generator: torch.Generator, options: MiniBatchOptions) -> Tensor:
    drawn = torch.randperm(len(z), generator=generator)[: max(SEEDING_SAMPLE * options.batch_size, 3 * n_clusters)]
    return plus_plus(z[drawn.to(z.device)], n_clusters, generator)


def _run(z: Tensor, mu: Tensor, generator: torch.Generator, options: MiniBatchOptions) -> KMeansResult:
    centre = z.mean(0)
    mu = (mu - centre).double()
    counts = torch.zeros(len(mu), dtype=torch.float64, device=z.device)
    batches = 0
    for epoch in range(options.epochs):
        before = counts.clone()
        for index in torch.randperm(len(z), generator=generator).split(options.batch_size):
            batch = z[index.to(z.device)] - centre
            labels, d2 = build_assign(batch, len(mu), "torch")(mu)
            mu, counts = updated(mu, counts, batch, labels)
            batches += 1
        if epoch + 1 < options.epochs:
            starved = torch.nonzero(counts - before < STARVED_SHARE * len(z) / len(mu))[:, 0][: len(batch)]
            # A moved centroid starts over: with its old count it could hardly move again.
            mu[starved] = batch[torch.topk(d2, len(starved)).indices].double()
            counts[starved] = 0.0
    centroids = (mu + centre).to(z.dtype)
    labels, d2 = nearest(z, centroids)
    return KMeansResult(centroids, labels, float(d2.double().sum()), batches)


def updated(mu: Tensor, counts: Tensor, batch: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Centroids (K, D) and member counts (K,), both float64, after a batch (B, D) with its assignment (B,)."""
    new = torch.bincount(labels, minlength=len(mu)).to(counts)
    sums = add_rows(torch.zeros_like(mu), labels, batch.double())
    total = counts + new
    return mu + (sums - new[:, None] * mu) / total.clamp_min(1.0)[:, None], total


class MiniBatchStream:
    """Learns K centroids from rows (D,) that each come by once; memory holds the seeding sample, then less than one batch.

    However many rows come at a time, the same rows in the same order give the same centroids. The rows should come in a random order: of
    the first ones, `SEEDING_SAMPLE` batches or 3 K, k-means++ makes the seeds. No centroid restarts: its rows will not come again.
    """

    def __init__(self, n_clusters: int, seed: int, batch_size: int = MiniBatchOptions.batch_size) -> None:
        self.n_clusters, self.batch_size = n_clusters, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[Tensor] = []
        self._count = 0  # of the rows that wait
        self._centre = torch.empty(0)
        self._mu: Tensor | None = None
        self._counts = torch.empty(0)

    def partial_fit(self, rows: Tensor) -> Self:
        """Takes rows (B, D), B of any size.

        Raises:
            DataError: the seeding sample has fewer distinct rows than there are clusters.
        """
        self._waiting.append(rows.detach().float())
        self._count += len(rows)
        pilot = max(SEEDING_SAMPLE * self.batch_size, 3 * self.n_clusters)
        if self._count >= (pilot if self._mu is None else self.batch_size):
            waiting = torch.cat(self._waiting)
            if self._mu is None:
                self._start(waiting[:pilot])
            self._count = len(waiting) % self.batch_size
            self._waiting = [waiting[len(waiting) - self._count :].clone()]  # a view would hold all of them
            self._learn(waiting[: len(waiting) - self._count])
        return self

    def finish(self) -> Self:
        """Learns from the rows that wait; the stream may go on."""
        waiting = torch.cat(self._waiting) if self._count else torch.empty(0)
        if self._mu is None:
            if not self._count:
                raise DataError(
                    f"method.n_clusters is {self.n_clusters}, but the stream ended before the first embedding"
                )
            self._start(waiting)
        self._waiting, self._count = [], 0
        self._learn(waiting)
        return self

    @property
    def centroids(self) -> Tensor:
        """(K, D) float32, without the rows that still wait.

        Raises:
            DataError: fewer rows came than the seeding sample needs; `finish` makes do with them.
        """
        if self._mu is None:
            raise DataError(f"{self._count} embeddings came, too few to begin with; finish() takes what there is")
        return (self._mu + self._centre).float()

    def _start(self, pilot: Tensor) -> None:
        check_distinct(pilot, self.n_clusters)
        self._centre = pilot.mean(0)
        self._mu = (plus_plus(pilot, self.n_clusters, self._generator) - self._centre).double()
        self._counts = torch.zeros(self.n_clusters, dtype=torch.float64, device=pilot.device)

    def _learn(self, rows: Tensor) -> None:
        if self._mu is None or not len(rows):
            return
        for batch in (rows - self._centre).split(self.batch_size):
            labels, _ = build_assign(batch, self.n_clusters, "torch")(self._mu)
            self._mu, self._counts = updated(self._mu, self._counts, batch, labels)
