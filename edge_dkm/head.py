"""The head of the graph once more, in numpy: from `embedding` to cluster and novelty, for providers that cannot override inputs.

    embedding (N,D) --[L2]--> cluster space --|z - centroids|--> distances (N,K) --first smallest--> cluster_id, distance
    s = |embedding - cluster_mean[id]| / cluster_radius[id]      before the L2; where there is a patch bank: max(s, patch_score)
    novelty_score = s / novelty_scale      p_value = (1 + sum w [c >= s]) / (1 + sum w)      is_novel = novelty_score > threshold

Contract 1's formulas, all float32. The inspector uses it where a codebook or threshold is replaced; without that, the graph answers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge_dkm.contract import CODEBOOK
from edge_dkm.errors import UsageError

Outputs = dict[str, NDArray[np.generic]]
Vector = NDArray[np.float32]
TINY = 1e-12  # the graph's own bound of the norm: an embedding of zeros stays one of zeros


def is_whole(codebook: Mapping[str, Vector]) -> bool:
    """Whether all six tensors of a codebook are there; some of them without the others raise UsageError."""
    missing = [spec.name for spec in CODEBOOK if spec.name not in codebook]
    if not missing:
        return True
    if len(missing) < len(CODEBOOK):
        raise UsageError(f"a codebook is replaced as a whole, but {', '.join(missing)} of it is missing")
    return False


def to_cluster_space(embedding: Vector, l2: bool) -> Vector:
    """(N, D) where the centroids live."""
    if not l2:
        return embedding
    norm = np.sqrt(np.square(embedding).sum(1, keepdims=True, dtype=np.float32))
    return np.asarray(embedding / np.maximum(norm, np.float32(TINY)), np.float32)


def compute_head(
    embedding: Vector, codebook: Mapping[str, Vector], threshold: float, l2: bool, patch_score: Vector | None = None
) -> Outputs:
    """Every output of the contract that follows from `embedding` (N, D) float32, the whole codebook and the threshold.

    Args:
        patch_score: (N,) of a graph with a patch bank, whose own radius and centroids no codebook changes.
    """
    z = to_cluster_space(embedding, l2)
    # Direct form, frame by frame: exact for an embedding that lies on a centroid, and small where K is large.
    distances = np.stack([np.sqrt(np.square(row - codebook["centroids"]).sum(1)) for row in z])  # (N, K)
    cluster_id = distances.argmin(1)  # the first of equals
    apart = np.sqrt(np.square(embedding - codebook["cluster_mean"][cluster_id]).sum(1))
    s = apart / codebook["cluster_radius"][cluster_id]
    if patch_score is not None:
        s = np.maximum(s, patch_score)
    novelty_score = s / codebook["novelty_scale"][0]
    weight = codebook["calibration_weight"]
    at_least = np.where(codebook["calibration"][None, :] >= s[:, None], weight[None, :], np.float32(0)).sum(1)
    return {
        "cluster_id": cluster_id.astype(np.int64),
        "distance": distances.min(1),
        "novelty_score": novelty_score,
        "p_value": (1 + at_least) / (1 + weight.sum()),
        "is_novel": novelty_score > np.float32(threshold),
        "distances": distances,
        "embedding": embedding,
    }
