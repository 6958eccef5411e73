"""Many embeddings under one codebook: nearest cluster and raw score. As edge_dkm/head.py, in blocks, in double precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_dkm.head import to_cluster_space

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
BLOCK = 2048


@dataclass(frozen=True)
class Space:
    """What a graph does behind its encoder. `l2`: whether clusters are told apart after an L2 normalisation."""

    n_clusters: int
    embed_dim: int
    l2: bool


def nearest(z: Floats, centroids: Floats) -> Ids:
    """(N,) ids of the nearest centroid of z (N, D) in cluster space; ties go to the lowest id."""
    middle = centroids.astype(np.float64).mean(0)
    c = centroids - middle
    half = 0.5 * np.square(c).sum(1)
    blocks = [(half - (z[i : i + BLOCK] - middle) @ c.T).argmin(1) for i in range(0, len(z), BLOCK)]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.int64)


def novelty_distance(embedding: Floats, cluster_mean: Floats, ids: Ids) -> Floats:
    """(N,) before any L2."""
    apart: Floats = np.sqrt(np.square(embedding - cluster_mean[ids]).sum(1))
    return apart


def raw_score(embedding: Floats, patch_score: Floats, codebook: Mapping[str, Floats], l2: bool) -> tuple[Ids, Floats]:
    """Cluster ids and raw scores s of N parts; `patch_score` is NaN where the graph has no patch bank."""
    ids = nearest(to_cluster_space(embedding, l2), codebook["centroids"])
    s = novelty_distance(embedding, codebook["cluster_mean"], ids) / codebook["cluster_radius"][ids]
    return ids, np.fmax(s, patch_score).astype(np.float32)
