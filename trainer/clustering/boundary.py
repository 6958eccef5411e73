"""Centroids whose nearest-centroid rule reproduces a given assignment, for a model that can only ask which centroid is nearest.

Class means are not the best such centroids: the border lies half-way, whatever the classes' shapes. Here the distances are the logits
of a softmax, and its cross-entropy is minimised over the centroids alone (Mensink et al., "Distance-based image classification", 2013,
eq. 2, with free means instead of their metric); a pull keeps them near the class means. On the unit sphere this is as strong as any
linear classifier: |z - mu|^2 = 1 - 2 z mu + |mu|^2. The embedding itself is not touched, so novelty keeps all directions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.clustering.kmeans import cluster_means

SHARPNESS = 10.0  # logits per mean squared distance to the middle: centroids then need to move little
ROUNDS = 200


@torch.enable_grad()
def fit_boundary(z: Tensor, labels: Tensor, n_clusters: int, pull: float) -> Tensor:
    """Centroids (K, D) for z (N, D) and its assignment (N,).

    Args:
        pull: weight of the squared distance to the class means, relative to the cross-entropy; infinite gives the class means.
    """
    z = z.detach()
    means = cluster_means(z, labels, n_clusters)
    if pull == float("inf") or n_clusters == 1:
        return means
    points, origin = z.double(), means.double()
    sharpness = SHARPNESS / (points - points.mean(0)).square().sum(1).mean().clamp_min(1e-12)
    squares = points.square().sum(1, keepdim=True)
    mu = origin.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([mu], max_iter=ROUNDS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        d2 = squares - 2 * points @ mu.T + mu.square().sum(1)
        value = nn.functional.cross_entropy(-sharpness * d2, labels) + pull * sharpness * (mu - origin).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return mu.detach().to(z.dtype)
