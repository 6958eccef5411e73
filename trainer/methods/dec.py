"""Deep Embedded Clustering: encoder and centroids refined together by self-training; `method.name: dec`.

Source: Xie, Girshick, Farhadi, "Unsupervised Deep Embedding for Clustering Analysis", 2016, arXiv 1511.06335, eq. 1 to 3.
    q_ij ~ (1 + d_ij / t_dof)^(-(t_dof + 1) / 2)        p_ij ~ q_ij^2 / sum_i q_ij        L = KL(P || Q) / B
P is of the whole data set, from images as they are, and constant between refreshes. Differs from the paper: convergence is measured
over at least one epoch, twice in a row (a short refresh interval moves few labels by itself); momentum is kept across refreshes;
distances may be divided by a fixed `length_scale`, since the kernel's own scale is 1 and normalised features lie closer than that.
`freeze_encoder` is the paper's "DEC without backprop": only the centroids move.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.assignment import log_student_t, target_distribution
from trainer.convergence import Convergence
from trainer.distance import nearest, squared_distances
from trainer.learner import Learner
from trainer.methods.base import MethodSettings
from trainer.methods.trained import TrainedMethod, TrainedSettings
from trainer.stage import OptimizerSettings


class SelfTrainingSettings(TrainedSettings):
    """What dec and idec share. `t_dof` is the paper's alpha, `refresh_steps` its T (None: half an epoch).

    `length_scale: auto` is the root mean squared distance to the own centroid at the start.
    """

    epochs: int = Field(100, ge=1)
    t_dof: float = Field(1.0, gt=0)
    length_scale: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    refresh_steps: int | None = Field(None, ge=1)
    tol: float = Field(0.001, ge=0, lt=1)
    optimizer: OptimizerSettings = OptimizerSettings(kind="sgd", lr=0.01)


class DECSettings(SelfTrainingSettings):
    """`freeze_encoder`: only the centroids move."""

    name: Literal["dec"] = "dec"
    freeze_encoder: bool = False


class DEC(TrainedMethod):
    """KL self-training of whatever is trainable: encoder, projection (with `projection.learn`), centroids."""

    Settings: ClassVar[type[MethodSettings]] = DECSettings
    title = "Deep Embedded Clustering (Xie et al. 2016)"
    settings: SelfTrainingSettings
    learns_centroids = True
    kept = ("p", "length_scale")

    def __init__(self, settings: SelfTrainingSettings, learner: Learner, batch_size: int) -> None:
        super().__init__(settings, learner, batch_size)
        n, k = len(learner), settings.n_clusters
        self.epochs = settings.epochs
        self.refresh_steps = settings.refresh_steps or max(1, self.steps_per_epoch // 2)
        self.convergence = Convergence(n, k, settings.tol, self.steps_per_epoch)
        self.p = torch.full((n, k), 1.0 / k)
        self.length_scale = torch.tensor(1.0, device=learner.device)

    def modules(self) -> list[nn.Module]:
        return [] if self._is_frozen else super().modules()

    def parameters(self) -> list[nn.Parameter]:
        return [self.learner.model.centroids] if self._is_frozen else super().parameters()

    @property
    def _is_frozen(self) -> bool:
        return isinstance(self.settings, DECSettings) and self.settings.freeze_encoder

    def warnings(self) -> list[str]:
        if self.moves_embeddings or self._is_frozen:
            return super().warnings()
        return [
            *super().warnings(),
            f"method {self.settings.name} moved only the centroids: encoder {self.learner.model.encoder.settings.name} is frozen; "
            f"projection.learn: true with projection.kind pca or within lets it move the embeddings",
        ]

    def start(self, z: Tensor) -> None:
        """Fixes the length scale."""
        if self.settings.length_scale == "auto":
            self.length_scale = nearest(z, self.learner.model.centroids)[1].mean().sqrt().clamp_min(1e-6)
        else:
            self.length_scale = torch.tensor(float(self.settings.length_scale), device=z.device)

    def log_q(self, z: Tensor) -> Tensor:
        """Log q (B, K) of latents z (B, D)."""
        mu = self.learner.model.centroids
        return log_student_t(squared_distances(z / self.length_scale, mu / self.length_scale), self.settings.t_dof)

    def loss(self, index: Tensor) -> Tensor:
        """KL(P || Q), summed over clusters, averaged over the batch."""
        return self.divergence(self.learner.latents(index), index)

    def divergence(self, z: Tensor, index: Tensor) -> Tensor:
        """KL(P || Q) of latents z (B, D) of samples `index`."""
        return torch.nn.functional.kl_div(self.log_q(z), self.p[index], reduction="batchmean")

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Every `refresh_steps`: new q, p and labels from a full pass; guards and churn."""
        if step % self.refresh_steps:
            return
        z, q = self._all_assigned(as_trained=True)  # a refresh is two fifths of an epoch: the whole set, forwards
        self.p = target_distribution(q)
        self.convergence.look(q, z, self.learner.model.centroids, step)

    @torch.no_grad()
    def end(self) -> None:
        """The guards' last look, at the labels as they ship: the steps since the last refresh were seen by none."""
        z, q = self._all_assigned(as_trained=False)
        self.convergence.look(q.argmax(1), z, self.learner.model.centroids, self.epochs * self.steps_per_epoch)

    def _all_assigned(self, as_trained: bool) -> tuple[Tensor, Tensor]:
        """Embeddings z (N, D) and q (N, K) of all training samples."""
        z = self.learner.all_latents(as_trained)
        return z, torch.cat([self.log_q(part).exp() for part in z.split(8192)])
