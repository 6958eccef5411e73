"""Soft assignments q and target distributions p of the self-training methods.

Source: Xie, Girshick, Farhadi, "Unsupervised Deep Embedding for Clustering Analysis", 2016, arXiv 1511.06335, eq. 1 and 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_student_t(d2: Tensor, t_dof: float = 1.0) -> Tensor:
    """Log q: (B, K) from squared distances (B, K); eq. 1 with alpha = `t_dof`. Stays finite for d2 = 0 and d2 = 1e6."""
    return torch.log_softmax(-((t_dof + 1) / 2) * torch.log1p(d2 / t_dof), dim=1)


def target_distribution(q: Tensor, frequency: Tensor | None = None) -> Tensor:
    """p: (N, K) of eq. 3, over the WHOLE data set: f_j = sum_i q_ij of a mini-batch is noise. Detached: p is constant between refreshes.

    Args:
        frequency: (K,) f_j of other data, where q is of data held out from it.
    """
    q = q.detach()
    weight = q.square() / (q.sum(0) if frequency is None else frequency)
    return weight / weight.sum(1, keepdim=True)
