"""Aligns clusterings with each other, so that an id means the same cluster before and after k-means ran again.

Source: Kuhn, "The Hungarian method for the assignment problem", 1955 (scipy's linear_sum_assignment).
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from trainer.distance import squared_distances_matmul


def match(previous: Tensor, found: Tensor) -> Tensor:
    """Permutation (K,) such that `found[permutation]` lies closest to `previous` row by row; both (K, D)."""
    d2 = squared_distances_matmul(previous, found, previous.mean(0))
    return torch.from_numpy(linear_sum_assignment(d2.detach().cpu().numpy())[1]).to(previous.device)


def label_names(reference: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """The new name (K,) of each of `labels` (N,), so that as many as possible agree with `reference` (N,); all in 0 .. K - 1."""
    counts = torch.bincount(reference * n_clusters + labels, minlength=n_clusters**2).reshape(n_clusters, n_clusters)
    rows, columns = linear_sum_assignment(-counts.cpu().numpy())
    names = torch.empty(n_clusters, dtype=torch.int64)
    names[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return names.to(labels.device)
