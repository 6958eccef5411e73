"""Mini-batch k-means that starts from the running centroids, so that each id keeps its meaning.

Sculley, "Web-scale k-means clustering", WWW 2010: each centroid moves towards its members by 1 / (members so far). Here a centroid
starts with the weight of HELD members of its own, or the first few parts of a batch would throw it about. A last pass puts each onto
the mean of its members.
"""

from __future__ import annotations

import numpy as np

from edge_dkm.recentring.scoring import Floats, Ids, nearest

HELD = 10
BATCH, EPOCHS = 1024, 5
MIN_MEMBERS = 10  # with fewer, a cluster stays as it is: their mean would say more of these parts than of the cluster


def recentred(z: Floats, start: Floats, rng: np.random.Generator) -> tuple[Floats, Ids]:
    """Centroids (K, D) and the ids (N,) of z (N, D), both in cluster space, under them."""
    centroids, weight = start.astype(np.float64), np.full(len(start), float(HELD))
    for _ in range(EPOCHS):
        order = rng.permutation(len(z))
        for i in range(0, len(z), BATCH):
            batch = z[order[i : i + BATCH]]
            ids = nearest(batch, centroids.astype(np.float32))
            counts = np.bincount(ids, minlength=len(start))
            sums = _sums(batch, ids, len(start))
            weight += counts
            centroids += (sums - counts[:, None] * centroids) / weight[:, None]
    found = means(z, nearest(z, centroids.astype(np.float32)), start)
    return found, nearest(z, found)


def means(z: Floats, ids: Ids, otherwise: Floats) -> Floats:
    """(K, D) mean of each cluster's members; where there are fewer than MIN_MEMBERS, the row of `otherwise`."""
    counts = np.bincount(ids, minlength=len(otherwise))
    found = _sums(z, ids, len(otherwise)) / np.maximum(counts, 1)[:, None]
    return np.where((counts >= MIN_MEMBERS)[:, None], found, otherwise).astype(np.float32)


def _sums(z: Floats, ids: Ids, k: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    sums = np.zeros((k, z.shape[1]))
    np.add.at(sums, ids, z)
    return sums
