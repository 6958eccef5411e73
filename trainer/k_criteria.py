"""What can be said about a number of clusters without labels, on embeddings: does each cluster come back, is it more than chance, does it carry over?

* weakest cluster: k-means on two disjoint halves; how well each cluster of the whole set is found again (Jaccard index, as in Hennig,
  "Cluster-wise assessment of cluster stability", 2007, where .75 is the bound of a valid cluster). The ARI between the halves
  hides one split cluster among many; the weakest cluster does not.
* gap: log inertia of structureless data of the same covariance, minus log inertia (Tibshirani, Walther, Hastie 2001). The
  reference is one Gaussian (as in Liu et al., "SigClust", 2008) or one uniform cloud, whichever k-means fits better: an elongated
  single cloud splits in the same place every time, but no better than the reference does.
* generalizability G(K) = L_train / L_validation of DEC's loss (Xie, Girshick, Farhadi 2016, section 5). The paper leaves the split and the target
  distribution of the validation part open: here 80/20 by group, the frequencies f_j of the training part for both, each part's p from its
  own q. Differs from the paper: centroids by k-means on a fixed embedding, not retrained by DEC for each K; distances over their root mean
  square. k-means does not minimise that loss, and on drawn blobs the curve did not point at their number: it is shown, not decided by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from trainer import metric
from trainer.assignment import log_student_t, target_distribution
from trainer.clustering.kmeans import KMeansOptions, kmeans
from trainer.distance import nearest, squared_distances
from trainer.errors import DataError

MAX_POINTS = 5000  # a criterion of centroids does not sharpen with more
RESAMPLES = 8  # pairs of halves per embedding
VALIDATIONS = 4  # of them also serve as 80/20 splits
REFERENCES = 3  # of each kind, per embedding
WHOLE_RESTARTS = KMeansOptions(n_init=20)  # as many as a method makes
RESTARTS = KMeansOptions(n_init=4)
FEW_RESTARTS = KMeansOptions(n_init=2)
POINTS_PER_CLUSTER = 4  # two in each half, at the very least

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Embedding:
    """`z` (N, D) in cluster space, `groups` (N,) that are never split, `is_unit` where the rows have length 1."""

    z: Tensor
    groups: NDArray[np.int64]
    is_unit: bool
    seed: int

    def thinned(self) -> Embedding:
        """At most MAX_POINTS rows, the same ones for every seed."""
        if len(self.z) <= MAX_POINTS:
            return self
        kept = np.sort(np.random.default_rng(0).permutation(len(self.z))[:MAX_POINTS])
        return Embedding(self.z[torch.from_numpy(kept).to(self.z.device)], self.groups[kept], self.is_unit, self.seed)


@dataclass(frozen=True)
class KFigures:
    """One K on one embedding; `labels` (N,) of k-means on all of it.

    `weakest`: mean Jaccard of the cluster that comes back worst, 0 to 1. `ari`: between halves. `gap`: in log inertia, against the stricter
    reference; `gap_error`: its standard error. `generalizability`: L_train / L_validation.
    """

    k: int
    weakest: float
    ari: float
    gap: float
    gap_error: float
    generalizability: float
    silhouette: float | None
    labels: Labels


def measure(embedding: Embedding, ks: list[int]) -> Iterator[KFigures]:
    """The figures of each K, in order.

    Raises:
        DataError: too few different points or groups for the largest K.
    """
    embedding = embedding.thinned()
    z, rng = embedding.z.float(), np.random.default_rng((embedding.seed, 11))
    distinct, groups = len(torch.unique(z, dim=0)), np.unique(embedding.groups)
    if min(distinct, len(z)) < POINTS_PER_CLUSTER * max(ks) or len(groups) < 5:
        raise DataError(
            f"--k goes up to {max(ks)}, but there are {len(z)} images in {len(groups)} groups with {distinct} different embeddings, "
            f"expected at least {POINTS_PER_CLUSTER * max(ks)} images and 5 groups; ask for fewer clusters or add images"
        )
    orders = [rng.permutation(groups) for _ in range(RESAMPLES)]
    smallest = min(_smaller_half(embedding, order) for order in orders)
    if smallest < 2 * max(ks):
        raise DataError(
            f"--k goes up to {max(ks)}, but groups are so uneven that a half of them holds only {smallest} images, expected at least "
            f"{2 * max(ks)}; ask for fewer clusters, or give data.groups that are smaller than half of the set"
        )
    references = [[_reference(embedding, rng, kind) for _ in range(REFERENCES)] for kind in ("normal", "uniform")]
    for k in ks:
        whole = kmeans(z, k, embedding.seed, WHOLE_RESTARTS)
        labels = whole.labels.cpu().numpy()
        pairs = [_halves(embedding, k, order, n) for n, order in enumerate(orders)]
        returned = np.mean([(_returned(labels, a, k) + _returned(labels, b, k)) / 2 for a, b in pairs], axis=0)
        gap, error = _gap(references, whole.inertia, k)
        yield KFigures(
            k=k,
            weakest=float(returned.min()),
            ari=float(np.mean([adjusted_rand_score(a, b) for a, b in pairs])),
            gap=gap,
            gap_error=error,
            generalizability=float(
                np.mean([_generalizability(embedding, k, order, n) for n, order in enumerate(orders[:VALIDATIONS])])
            ),
            silhouette=metric.silhouette(z.cpu().numpy(), labels, sample=2000),
            labels=labels,
        )


def _smaller_half(embedding: Embedding, order: NDArray[np.int64]) -> int:
    """Images in the smaller half of the groups in this order."""
    first = int(np.isin(embedding.groups, order[: len(order) // 2]).sum())
    return min(first, len(embedding.z) - first)


def _halves(embedding: Embedding, k: int, order: NDArray[np.int64], n: int) -> tuple[Labels, Labels]:
    """All points assigned by k-means on either half of the groups."""
    first = torch.from_numpy(np.isin(embedding.groups, order[: len(order) // 2])).to(embedding.z.device)
    fits = (
        kmeans(embedding.z[mask], k, embedding.seed + 100 * n + side, RESTARTS)
        for side, mask in enumerate((first, ~first))
    )
    a, b = (nearest(embedding.z, fit.centroids)[0].cpu().numpy() for fit in fits)
    return a, b


def _returned(labels: Labels, other: Labels, k: int) -> NDArray[np.float64]:
    """(K,) Jaccard index of each cluster of `labels` with the one of `other` that it meets best."""
    both = metric.contingency(other, labels, k)
    either = both.sum(1, keepdims=True) + both.sum(0, keepdims=True) - both
    best: NDArray[np.float64] = (both / np.maximum(either, 1)).max(1)
    return best


def _reference(embedding: Embedding, rng: np.random.Generator, kind: str) -> Tensor:
    """Structureless points (N, D) of the embedding's mean and covariance."""
    z = embedding.z.double().cpu()
    mean = z.mean(0)
    _, singular, directions = torch.linalg.svd(z - mean, full_matrices=False)
    size = (len(z), len(singular))
    noise = rng.normal(size=size) if kind == "normal" else rng.uniform(-(3**0.5), 3**0.5, size)
    x = mean + (torch.from_numpy(noise) * singular / len(z) ** 0.5) @ directions
    if embedding.is_unit:
        x = torch.nn.functional.normalize(x, dim=1)
    return x.to(embedding.z)


def _gap(references: list[list[Tensor]], inertia: float, k: int) -> tuple[float, float]:
    """Gap to the kind of reference that k-means fits best, and the standard error."""
    logs = [
        [np.log(max(kmeans(x, k, n, FEW_RESTARTS).inertia, 1e-12)) for n, x in enumerate(kind)] for kind in references
    ]
    closest = min(logs, key=lambda kind: float(np.mean(kind)))
    return float(np.mean(closest) - np.log(max(inertia, 1e-12))), float(np.std(closest) * (1 + 1 / len(closest)) ** 0.5)


def _generalizability(embedding: Embedding, k: int, order: NDArray[np.int64], n: int) -> float:
    """DEC's loss on 80 % of the groups over its loss on the rest."""
    is_train = torch.from_numpy(np.isin(embedding.groups, order[: 4 * len(order) // 5])).to(embedding.z.device)
    train, validation = embedding.z[is_train], embedding.z[~is_train]
    fitted = kmeans(train, k, embedding.seed + n, FEW_RESTARTS)
    scale = max(fitted.inertia / len(train), 1e-12)
    log_q = [log_student_t(squared_distances(part, fitted.centroids) / scale) for part in (train, validation)]
    frequency = log_q[0].exp().sum(0)
    losses = [divergence(part, frequency) for part in log_q]
    return losses[0] / max(losses[1], 1e-12)


def divergence(log_q: Tensor, frequency: Tensor) -> float:
    """KL(P || Q) per sample, p from this q (B, K) and the given cluster frequencies (K,)."""
    p = target_distribution(log_q.exp(), frequency)
    return float(torch.nn.functional.kl_div(log_q, p, reduction="batchmean"))
