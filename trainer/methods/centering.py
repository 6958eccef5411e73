"""Centering: embeddings drawn to centroids that stand still within an epoch; k-means finds them anew at its end; `method.name: centering`.

Source: Roy, "An Approach Towards Learning K-means-friendly Deep Latent Representation", ICPR 2024, arXiv 2411.19496.
    L = |x - g(f(x))|^2 + ct_weight sum_k G_ik |f(x_i) - r_k|^2,   r constant in the epoch; summed over elements, averaged over the batch
Which of two the paper calls alpha could not be settled from what is published of it, so both are keys: `alpha`, the sharpness of the
softmax G (reading A: alpha 2, 5, 10 ..., ct_weight 1), and `ct_weight`, the strength of the centering (reading B: assignment hard,
ct_weight 2, 4 ...). Differs from the paper: k-means at an epoch's end starts from the last centroids as well as from `restarts`
new ones, and its rows are matched to the last ones, so that ids stay; it stops when assignments rest.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.clustering.recluster import Algorithm, recluster
from trainer.convergence import Convergence
from trainer.distance import nearest, squared_distances
from trainer.learner import Learner
from trainer.methods.dkm import soft_kmeans_loss
from trainer.methods.trained import TrainedMethod, TrainedSettings
from trainer.stage import EpochReport, OptimizerSettings


class CenteringSettings(TrainedSettings):
    """`restarts` k-means runs from new seeds at each epoch's end beside the warm one."""

    name: Literal["centering"] = "centering"
    epochs: int = Field(100, ge=1)
    alpha: float = Field(2.0, gt=0)
    ct_weight: float = Field(1.0, gt=0)
    assignment: Literal["soft", "hard"] = "soft"
    algorithm: Algorithm = "kmeans"
    restarts: int = Field(10, ge=0)
    tol: float = Field(0.001, ge=0, lt=1)
    optimizer: OptimizerSettings = OptimizerSettings(kind="adam", lr=1e-4)


class Centering(TrainedMethod):
    """Gradient steps of the autoencoder towards fixed centroids, k-means at every epoch's end."""

    Settings = CenteringSettings
    title = "centering loss against fixed centroids, k-means every epoch (Roy 2024)"
    settings: CenteringSettings
    needs_decoder = True

    def __init__(self, settings: CenteringSettings, learner: Learner, batch_size: int) -> None:
        super().__init__(settings, learner, batch_size)
        self.epochs = settings.epochs
        self.convergence = Convergence(len(learner), settings.n_clusters, settings.tol, self.steps_per_epoch)

    def loss(self, index: Tensor) -> Tensor:
        """Reconstruction and centering; no gradient reaches the centroids."""
        z, error = self.reconstruct(index)
        d2 = squared_distances(z, self.learner.model.centroids.detach())
        hard = self.settings.assignment == "hard"
        return error.mean() + self.settings.ct_weight * (
            d2.min(1).values.mean() if hard else soft_kmeans_loss(d2, self.settings.alpha)
        )

    @torch.no_grad()
    def after_epoch(self, epoch: int) -> EpochReport:
        z, mu = self.learner.all_latents(), self.learner.model.centroids
        self.convergence.check(z)
        options = self.settings
        mu.copy_(recluster(z, mu, self.learner.seed + epoch + 1, options.restarts, options.algorithm))
        self.convergence.look(nearest(z, mu)[0], z, mu, (epoch + 1) * self.steps_per_epoch)
        return super().after_epoch(epoch)
