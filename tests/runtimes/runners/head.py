"""The graph's head in numpy, for runtimes that cannot override an input: `embedding` in, the other outputs out. docs/runtimes.md shows it."""

import numpy as np


def head(embedding, tensors, l2, patch_score=None):
    """Outputs for `embedding` (N, D) float32 with `tensors`: novelty_threshold and the six of a codebook.

    `patch_score` (N,) of a model with a bank joins the raw score; no codebook changes it.
    """
    z = embedding
    if l2:
        z = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-12)
    distances = np.sqrt(np.square(z[:, None] - tensors["centroids"][None]).sum(2))  # (N, K)
    cluster_id = distances.argmin(1)
    novelty_distance = np.sqrt(np.square(embedding - tensors["cluster_mean"][cluster_id]).sum(1))
    s = novelty_distance / tensors["cluster_radius"][cluster_id]
    if patch_score is not None:
        s = np.maximum(s, patch_score)
    weight = tensors["calibration_weight"]
    above = np.where(tensors["calibration"][None] >= s[:, None], weight[None], 0).sum(1)
    novelty_score = s / tensors["novelty_scale"]
    return {
        "cluster_id": cluster_id,
        "distance": distances.min(1),
        "novelty_score": novelty_score,
        "p_value": (1 + above) / (1 + weight.sum()),
        "is_novel": novelty_score > tensors["novelty_threshold"],
        "distances": distances,
        "embedding": embedding,
    }
