"""Deep Embedded k-Means: k-means, then the encoder moves the most scattered direction inside clusters to its centroid; `method.name: dekm`.

Source: Guo, Lin, Ye, "Deep Embedded K-Means Clustering", 2021, arXiv 2109.15149, and the authors' code.
    S_w = sum_i (z_i - mu_s)(z_i - mu_s)^T = V diag(e) V^T,  e ascending        y = V^T z
    L = |y(x) - y*|^2 / D,   y* = the last refresh's y with its LAST coordinate (largest e) replaced by the centroid's
Every `refresh_steps`: full pass, k-means, S_w, V. Differs from the authors' code: k-means starts from the last centroids beside
`restarts` new seeds (the code runs 100 restarts at first, then twice the last number of iterations); samples are shuffled every
epoch; assignments must rest (churn below `tol` from refresh to refresh) twice in a row; a last k-means sets the centroids.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.clustering.recluster import recluster
from trainer.convergence import Convergence
from trainer.distance import nearest
from trainer.learner import Learner
from trainer.methods.trained import TrainedMethod, TrainedSettings
from trainer.stage import OptimizerSettings


class DEKMSettings(TrainedSettings):
    """`refresh_steps` between two k-means; `restarts` of it from new seeds beside the one from the last centroids."""

    name: Literal["dekm"] = "dekm"
    epochs: int = Field(50, ge=1)
    refresh_steps: int = Field(40, ge=1)
    restarts: int = Field(2, ge=0)
    tol: float = Field(0.005, ge=0, lt=1)
    optimizer: OptimizerSettings = OptimizerSettings(kind="adam", lr=1e-3)


class DEKM(TrainedMethod):
    """Greedy minimisation of the within-class scatter, one rotated direction at a time; the decoder is dropped."""

    Settings = DEKMSettings
    title = "Deep Embedded k-Means, largest within-class direction first (Guo et al. 2021)"
    settings: DEKMSettings
    kept = ("rotation", "target")

    def __init__(self, settings: DEKMSettings, learner: Learner, batch_size: int) -> None:
        super().__init__(settings, learner, batch_size)
        self.need_trainable(or_projection=True)
        self.epochs = settings.epochs
        self.convergence = Convergence(len(learner), settings.n_clusters, settings.tol, settings.refresh_steps)
        dim = learner.model.projection.out_dim
        self.rotation = torch.eye(dim, device=learner.device)
        self.target = torch.zeros(len(learner), dim, device=learner.device)

    def loss(self, index: Tensor) -> Tensor:
        """Mean squared distance to the target coordinates."""
        return torch.nn.functional.mse_loss(self.learner.latents(index) @ self.rotation, self.target[index])

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Every `refresh_steps`: centroids, rotation and targets from a full pass."""
        if step % self.settings.refresh_steps:
            return
        z, mu = self.learner.all_latents(), self.learner.model.centroids
        self.convergence.check(z)
        mu.copy_(recluster(z, mu, self.learner.seed + step, self.settings.restarts))
        labels = nearest(z, mu)[0]
        self.convergence.look(labels, z, mu, step)
        self.rotation = within_class_rotation(z, mu.detach(), labels)
        self.target = z @ self.rotation
        self.target[:, -1] = (mu @ self.rotation)[labels, -1]

    @torch.no_grad()
    def end(self) -> None:
        """The centroids of the embeddings as they ended."""
        z, mu = self.learner.all_latents(), self.learner.model.centroids
        self.convergence.check(z)
        mu.copy_(recluster(z, mu, self.learner.seed, restarts=0))
        self.convergence.look(nearest(z, mu)[0], z, mu, self.epochs * self.steps_per_epoch)


def within_class_rotation(z: Tensor, mu: Tensor, labels: Tensor) -> Tensor:
    """V (D, D): orthonormal eigenvectors of the within-class scatter of z (N, D), the largest eigenvalue last."""
    residual = (z - mu[labels]).double()
    # Contiguous, as a checkpoint gives it back: a matrix product's last digit depends on the layout.
    return torch.linalg.eigh(residual.T @ residual).eigenvectors.to(z.dtype).contiguous()
