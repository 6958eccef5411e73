"""Distances from embeddings to centroids: the one operation that trainer, methods and exported graph share.

z: (B, D) embeddings; mu: (K, D) centroids; d2: (B, K) squared distances. Direct form while K x D is small: it is exact for a
latent that lies on a centroid. The expanded form |z|^2 - 2 z mu + |mu|^2 goes negative there (measured: -.125 at scale 100),
so it is centred first and clamped before a root.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIRECT_LIMIT = 64 * 1024  # K x D up to which the direct form's (B, K, D) intermediate is cheap


def squared_distances(z: Tensor, mu: Tensor) -> Tensor:
    """d2: (B, K), direct form."""
    return (z[:, None, :] - mu).square().sum(-1)


def squared_distances_matmul(z: Tensor, mu: Tensor, centre: Tensor | None) -> Tensor:
    """d2: (B, K) by one matrix product, clamped at 0.

    Args:
        centre: (D,) a constant near the data, so that the three terms are small and cancel less; None where the data lie around the origin.
    """
    if centre is not None:
        z, mu = z - centre, mu - centre
    d2 = z.square().sum(1, keepdim=True) - 2 * (z @ mu.T) + mu.square().sum(1)
    return d2.clamp_min(0.0)


def nearest(z: Tensor, mu: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Index (N,) of the nearest centroid and the squared distance (N,) to it; ties go to the lowest index."""
    centre = mu.mean(0)
    ids, d2 = [], []
    for part in z.split(chunk):
        if mu.numel() <= DIRECT_LIMIT and len(part) * mu.numel() <= 1 << 26:
            distances = squared_distances(part, mu)
        else:
            distances = squared_distances_matmul(part, mu, centre)
        best, index = distances.min(1)
        ids.append(index)
        d2.append(best)
    return torch.cat(ids), torch.cat(d2)
