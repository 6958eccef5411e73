"""Guards that stop a training run which more epochs will not mend; each names itself. The last good checkpoint stays (checkpoint.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer.errors import CollapseError

MIN_EFFECTIVE_SHARE = 0.5  # of the effective number at the start
MIN_EFFECTIVE = 1.05  # of two clusters, one then holds 99 %; less where it was nearly as few at the start
MAX_EMPTY_REFRESHES = 3
MIN_SPREAD_SHARE = 0.01  # of the spread before clustering
MIN_CENTRE_SHARE = 1e-3  # smallest distance between centroids, of the median one


def check_finite(loss: float, stage: str, epoch: int) -> None:
    """Raises CollapseError for NaN or infinity."""
    if not math.isfinite(loss):
        raise CollapseError(
            "guard nan",
            f"the loss of stage {stage} is {loss} in epoch {epoch}; lower the learning rate, or look for constant images",
        )


def check_embeddings_finite(z: Tensor) -> Tensor:
    """Gives back z (N, D): asked before k-means, which would find few different rows in it and blame the images.

    Raises:
        CollapseError: a value is NaN, infinite, or so large (some 1e19) that squared distances are.
    """
    if not math.isfinite(float(torch.linalg.vector_norm(z))):  # without a copy of what may be most of the memory
        raise CollapseError(
            "guard nan",
            "the embeddings hold values that are not finite, or whose squares are not; lower the learning rate "
            "(pretrain.optimizer.lr, method.optimizer.lr), or where the encoder is frozen look at encoder.weights",
        )
    return z


def empty_clusters(clusters: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning where a finished run's table of clusters shows some without an image; a single look is not enough for a guard."""
    empty = [cluster["name"] for cluster in clusters if cluster["n"] == 0]
    return [f"no training image in {', '.join(empty)}: lower method.n_clusters ({len(clusters)})"] if empty else []


@dataclass
class ClusterGuard:
    """Watches soft assignments between refreshes.

    `spread`: trace of the embeddings' covariance before clustering; `n_eff`: effective number of the clusters then, where they came from
    the data (a set of mostly one kind fills few of them from the start), else K.
    """

    n_clusters: int
    spread: float
    n_eff: float
    empty_refreshes: int = field(default=0)

    def check_embeddings(self, z: Tensor) -> float:
        """The spread of z (N, D), where it is finite and not gone.

        Raises:
            CollapseError: naming the guard.
        """
        spread = float(check_embeddings_finite(z).var(0, unbiased=False).sum())
        if spread < MIN_SPREAD_SHARE * self.spread:
            raise CollapseError(
                "guard spread",
                f"the embeddings' variance fell to {spread / self.spread:.2%} of its start; "
                f"the encoder maps everything to one point; lower method.optimizer.lr, or the weight of the clustering loss where the method "
                f"has one",
            )
        return spread

    def figures(self, q: Tensor, z: Tensor, mu: Tensor) -> dict[str, float]:
        """Checks q (N, K), z (N, D), mu (K, D) and returns what goes into the log.

        Raises:
            CollapseError: naming the guard.
        """
        spread = self.check_embeddings(z)
        n_eff = float(effective_number(q))
        counts = torch.bincount(q.argmax(1), minlength=self.n_clusters)
        empty = int((counts == 0).sum())
        self.empty_refreshes = self.empty_refreshes + 1 if empty else 0
        gaps = torch.pdist(mu.detach()) if self.n_clusters > 1 else torch.ones(1)
        if not math.isfinite(n_eff):
            raise CollapseError(
                "guard nan", "the soft assignments hold values that are not finite; lower the learning rate"
            )
        floor = max(MIN_EFFECTIVE_SHARE * self.n_eff, min(MIN_EFFECTIVE, 1 + (self.n_eff - 1) / 2))
        if self.n_clusters > 1 and n_eff < floor:
            raise CollapseError(
                "guard n_eff",
                f"the mean assignment fills only {n_eff:.2f} of {self.n_clusters} clusters, expected at least {floor:.2f}; lower method.n_clusters, "
                f"method.optimizer.lr or the weight of the clustering loss where the method has one, or pre-train longer (pretrain.epochs)",
            )
        if self.empty_refreshes >= MAX_EMPTY_REFRESHES:
            raise CollapseError(
                "guard empty",
                f"{empty} cluster(s) stayed empty for {MAX_EMPTY_REFRESHES} refreshes; lower method.n_clusters",
            )
        if self.n_clusters > 1 and float(gaps.min()) < MIN_CENTRE_SHARE * float(gaps.median()):
            raise CollapseError(
                "guard centres",
                f"two centroids lie {float(gaps.min()):.3g} apart, the median pair {float(gaps.median()):.3g}; "
                f"lower method.n_clusters",
            )
        return {"n_eff": n_eff, "smallest": float(counts.min()), "spread": spread, "closest": float(gaps.min())}


def effective_number(q: Tensor) -> Tensor:
    """Exp of the entropy of the mean assignment: K where all clusters are equally used, 1 where one holds everything."""
    share = q.mean(0)
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
