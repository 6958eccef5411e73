"""Deep k-Means: k-means made differentiable by a softmax over distances; encoder, decoder and centroids by gradient; `method.name: dkm`.

Source: Moradi Fard, Thonet, Gaussier, "Deep k-Means: Jointly clustering with k-Means and learning representations", 2018, arXiv 1806.10069.
    G_ik = softmax_k(-alpha d_ik)        L = |x - g(f(x))|^2 + lambda sum_k d_ik G_ik        summed over elements, averaged over the batch
The gradient flows through G. Two published modes: `alpha: 1000` on a pre-trained autoencoder with k-means centroids (100 epochs), and
`alpha: annealed` with `init: uniform` and `pretrain.kind: none` (40 values of alpha, 5 epochs each). Differs from the authors' code:
labels come from a clean full pass, epochs see every sample once, and a centroid that lost its samples, or met another one, is moved
to the sample farthest from all, since at alpha 1000 nothing else would ever reach it. Adam's default rate is 1e-4 instead of 1e-3,
which threw the clusters of a pre-trained autoencoder together in its first epochs (docs/accuracy.md); from scratch use 1e-3.
While alpha anneals the guards speak from its second half on. It needs wide embeddings at the start (`encoder.init: glorot`, as the authors)
and a `clustering_weight` under which they do not shrink faster than alpha grows, which the logged `sharpness` shows without labels.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.convergence import Convergence
from trainer.distance import nearest, squared_distances
from trainer.guards import MIN_CENTRE_SHARE
from trainer.learner import Learner
from trainer.methods.trained import TrainedMethod, TrainedSettings
from trainer.stage import EpochReport, OptimizerSettings

FIRST_ALPHA, ANNEALED_ALPHAS = 0.1, 40
MIN_SHARPNESS = 3.0  # a centroid twice as far (squared) as the nearest then has a twentieth of its weight
MIN_SHARE = 0.5  # samples, of the whole set: a centroid with less gets no gradient worth the name


class DKMSettings(TrainedSettings):
    """`clustering_weight` is the paper's lambda, of sum-reduced losses.

    `epochs_per_alpha` of each value; a fixed alpha counts as `rounds` values. `scale_alpha` divides alpha by the median squared
    distance to the nearest centroid at the start: alpha is not scale free.
    """

    name: Literal["dkm"] = "dkm"
    alpha: Annotated[float, Field(ge=0)] | Literal["annealed"] = 1000.0
    rounds: int = Field(20, ge=1)
    epochs_per_alpha: int = Field(5, ge=1)
    clustering_weight: float = Field(1.0, gt=0)
    scale_alpha: bool = False
    optimizer: OptimizerSettings = OptimizerSettings(kind="adam", lr=1e-4)


class DKM(TrainedMethod):
    """Joint gradient descent on reconstruction and soft k-means loss."""

    Settings = DKMSettings
    title = "Deep k-Means, softmax assignment, pre-trained or annealed (Moradi Fard et al. 2018)"
    settings: DKMSettings
    needs_decoder = True
    learns_centroids = True
    kept = ("unit", "sharpness", "reseeded")

    def __init__(self, settings: DKMSettings, learner: Learner, batch_size: int) -> None:
        super().__init__(settings, learner, batch_size)
        self.alphas = annealed_alphas() if settings.alpha == "annealed" else [settings.alpha] * settings.rounds
        self.epochs = len(self.alphas) * settings.epochs_per_alpha
        self.convergence = Convergence(len(learner), settings.n_clusters, 0.0, self.steps_per_epoch)
        self.unit, self.sharpness, self.epoch = torch.tensor(1.0), torch.tensor(torch.inf), 0
        self.reseeded = torch.zeros(settings.n_clusters, dtype=torch.bool, device=learner.device)

    def start(self, z: Tensor) -> None:
        """The unit of alpha."""
        if self.settings.scale_alpha:
            self.unit = nearest(z, self.learner.model.centroids)[1].median().clamp_min(1e-12)

    @torch.no_grad()
    def before_epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer forgets centroids that were moved since the last epoch: its moments belong to where they lay."""
        super().before_epoch(epoch, optimizer)
        mu = self.learner.model.centroids
        for moment in optimizer.state.get(mu, {}).values():
            if isinstance(moment, Tensor) and moment.shape == mu.shape:
                moment[self.reseeded] = 0
        self.reseeded.fill_(False)

    def before_step(self, step: int) -> None:
        """Notes the epoch, which decides alpha."""
        self.epoch = step // self.steps_per_epoch

    @property
    def alpha(self) -> float:
        """The sharpness of this epoch."""
        return self.alphas[self.epoch // self.settings.epochs_per_alpha] / float(self.unit)

    def loss(self, index: Tensor) -> Tensor:
        """Reconstruction and soft k-means loss."""
        z, error = self.reconstruct(index)
        return error.mean() + self.settings.clustering_weight * soft_kmeans_loss(
            squared_distances(z, self.learner.model.centroids), self.alpha
        )

    @torch.no_grad()
    def after_epoch(self, epoch: int) -> EpochReport:
        """After each value of alpha: lost centroids, then the guards; while alpha is small every sample belongs a little to all."""
        if (epoch + 1) % self.settings.epochs_per_alpha:
            return EpochReport({"alpha": self.alpha, **self.logged})
        z, mu = self.learner.all_latents(), self.learner.model.centroids
        self.convergence.check(z)
        labels, d2 = nearest(z, mu)
        self.sharpness = self.alpha * d2.median()
        moved = 0 if epoch + 1 == self.epochs else self._repair(z, d2)  # after the last epoch nothing would train it
        if self.settings.alpha != "annealed" or (epoch + 1) * 2 > self.epochs:
            labels = nearest(z, mu)[0] if moved else labels
            self.convergence.look(labels, z, mu, (epoch + 1) * self.steps_per_epoch)
        return EpochReport(
            {"alpha": self.alpha, "sharpness": float(self.sharpness), "moved": float(moved), **self.logged}
        )

    def warnings(self) -> list[str]:
        if self.settings.alpha != "annealed" or self.sharpness >= MIN_SHARPNESS:
            return super().warnings()
        return [
            *super().warnings(),
            f"method dkm ended with assignments that are still soft: alpha times the median squared distance to the nearest centroid is "
            f"{float(self.sharpness):.2g}, expected at least {MIN_SHARPNESS:g}; the embedding shrank: lower method.clustering_weight "
            f"({self.settings.clustering_weight:g})",
        ]

    def _repair(self, z: Tensor, d2: Tensor) -> int:
        """Moves centroids that no gradient reaches, or that lie on another one, to the samples farthest from all; returns how many.

        `d2` (N,): squared distances of z to the nearest centroid.
        """
        mu = self.learner.model.centroids
        share = sum(soft_assignment(squared_distances(part, mu), self.alpha).sum(0) for part in z.split(8192))
        gaps = torch.cdist(mu, mu).masked_fill(torch.ones(len(mu), len(mu), device=mu.device).triu().bool(), torch.inf)
        median = torch.pdist(mu).median()
        lost = torch.nonzero((share < MIN_SHARE) | (gaps.min(1).values < MIN_CENTRE_SHARE * median))[:, 0]
        for k in lost.tolist():
            mu[k] = z[d2.argmax()]
            d2 = d2.minimum((z - mu[k]).square().sum(1))
        self.reseeded[lost] = True
        return len(lost)


def soft_kmeans_loss(d2: Tensor, alpha: float) -> Tensor:
    """Mean over samples of sum_k d_ik G_ik for squared distances d2 (B, K); the shift by the row's minimum keeps exp finite."""
    return (soft_assignment(d2, alpha) * d2).sum(1).mean()


def soft_assignment(d2: Tensor, alpha: float) -> Tensor:
    """G (B, K) of squared distances d2 (B, K)."""
    return torch.softmax(-alpha * (d2 - d2.min(1, keepdim=True).values), dim=1)


def annealed_alphas() -> list[float]:
    """The paper's 40 values: alpha_1 = .1, alpha_(i+1) = 2^(1 / ln(i+1)^2) alpha_i, up to 28.13."""
    alphas = [FIRST_ALPHA]
    for i in range(1, ANNEALED_ALPHAS):
        alphas.append(2 ** (1 / math.log(i + 1) ** 2) * alphas[-1])
    return alphas
