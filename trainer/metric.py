"""Scores of a clustering: against labels where they exist (they serve scoring only), and without."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class LabelScores:
    """ACC with the best one-to-one map (Hungarian), NMI with the arithmetic mean, ARI, purity; all 1 for a perfect match."""

    acc: float
    nmi: float
    ari: float
    purity: float


def score_labels(truth: Labels, predicted: Labels) -> LabelScores:
    """Scores cluster ids (N,) against class indices (N,)."""
    counts = contingency(truth, predicted)
    rows, columns = linear_sum_assignment(-counts)
    return LabelScores(
        acc=float(counts[rows, columns].sum() / len(truth)),
        nmi=float(normalized_mutual_info_score(truth, predicted, average_method="arithmetic")),
        ari=float(adjusted_rand_score(truth, predicted)),
        purity=float(counts.max(1).sum() / len(truth)),
    )


def contingency(truth: Labels, predicted: Labels, size: int | None = None) -> NDArray[np.int64]:
    """Counts (size, size): row = cluster, column = class. Square, since Hungarian needs a partner for each; `size` None: max(K, C)."""
    size = size or int(max(truth.max(), predicted.max())) + 1
    counts = np.zeros((size, size), np.int64)
    np.add.at(counts, (predicted, truth), 1)
    return counts


def silhouette(z: NDArray[np.float32], ids: Labels, seed: int = 0, sample: int = 5000) -> float | None:
    """Mean silhouette in the space of `z` (N, D), on a sample; None where there is one cluster. Compare methods in ONE fixed space only."""
    drawn = np.random.default_rng(seed).permutation(len(z))[:sample]
    z, ids = z[drawn], ids[drawn]  # a rare cluster may not be drawn at all
    found = len(np.unique(ids))
    return float(silhouette_score(z, ids)) if 2 <= found < len(ids) else None


def occupancy(ids: Labels, n_clusters: int) -> NDArray[np.int64]:
    """Members per cluster (K,)."""
    return np.bincount(ids, minlength=n_clusters)


def effective_clusters(share: NDArray[np.float64]) -> float:
    """Exp of the entropy of the cluster shares: K where all are equal, 1 where one holds everything."""
    share = share[share > 0] / share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
