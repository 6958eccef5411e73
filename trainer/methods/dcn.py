"""Deep Clustering Network: embeddings pulled to hard k-means centroids, which follow as running means; `method.name: dcn`.

Source: Yang, Fu, Sidiropoulos, Hong, "Towards K-means-friendly Spaces", ICML 2017, arXiv 1610.04794, eq. 3 and section 3.2.
    L = |x - g(f(x))|^2 + lambda / 2 |f(x) - mu_s|^2        both summed over elements, averaged over the batch
    after each step, per sample: s = nearest mu;  c_s += 1;  mu_s -= (mu_s - f(x)) / c_s
As in the authors' code the counts c start at 100, and every 10 epochs a full k-means, started from the centroids, replaces
centroids, assignments and counts. Differs from the paper: the centroid update is of a batch at once, with its labels fixed (the
same result as one by one); all labels are found anew after every epoch, and k-means comes early where a cluster lost its last member;
it stops when assignments rest; Adam instead of SGD; encoder and decoder do not share weights; inputs in the scale of
`preprocess.normalise` (authors: 0 to 5.1), which moves the balance that lambda sets. The half is the paper's: the authors' code
has none, so its weights of 1 and 1 are `clustering_weight` 2 here.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.clustering.kmeans import kmeans
from trainer.clustering.mini_batch import updated
from trainer.convergence import Convergence
from trainer.distance import nearest
from trainer.learner import Learner
from trainer.methods.trained import TrainedMethod, TrainedSettings
from trainer.stage import EpochReport, OptimizerSettings


class DCNSettings(TrainedSettings):
    """`clustering_weight` is the paper's lambda; `initial_count` how slowly centroids move at first."""

    name: Literal["dcn"] = "dcn"
    epochs: int = Field(50, ge=1)
    clustering_weight: float = Field(1.0, gt=0)
    initial_count: int = Field(100, ge=1)
    kmeans_every_epochs: int = Field(10, ge=1)
    tol: float = Field(0.001, ge=0, lt=1)
    optimizer: OptimizerSettings = OptimizerSettings(kind="adam", lr=1e-4)


class DCN(TrainedMethod):
    """Alternates gradient steps of the autoencoder, assignments, and centroids."""

    Settings = DCNSettings
    title = "Deep Clustering Network, running-mean centroids (Yang et al. 2017)"
    settings: DCNSettings
    needs_decoder = True
    kept = ("labels", "counts")

    def __init__(self, settings: DCNSettings, learner: Learner, batch_size: int) -> None:
        super().__init__(settings, learner, batch_size)
        self.epochs = settings.epochs
        self.convergence = Convergence(len(learner), settings.n_clusters, settings.tol, self.steps_per_epoch)
        self.labels = torch.zeros(len(learner), dtype=torch.int64, device=learner.device)
        self.counts = torch.full(
            (settings.n_clusters,), float(settings.initial_count), dtype=torch.float64, device=learner.device
        )

    def start(self, z: Tensor) -> None:
        """Labels by the initial centroids."""
        self.labels = nearest(z, self.learner.model.centroids)[0]

    def loss(self, index: Tensor) -> Tensor:
        """Reconstruction and distance to the stored label's centroid; the centroids get no gradient."""
        z, error = self.reconstruct(index)
        pull = (z - self.learner.model.centroids.detach()[self.labels[index]]).square().sum(1)
        return error.mean() + self.settings.clustering_weight / 2 * pull.mean()

    @torch.no_grad()
    def after_step(self, index: Tensor) -> None:
        """New labels of the batch, then its running means."""
        z, mu = self.learner.clean_latents(index), self.learner.model.centroids
        labels = nearest(z, mu)[0]
        self.labels[index] = labels
        moved, self.counts = updated(mu.detach().double(), self.counts, z, labels)
        mu.copy_(moved)

    @torch.no_grad()
    def after_epoch(self, epoch: int) -> EpochReport:
        z, mu = self.learner.all_latents(), self.learner.model.centroids
        self.convergence.check(z)
        self.labels = nearest(z, mu)[0]
        has_lost_one = len(torch.unique(self.labels)) < len(mu)  # k-means finds it again
        if has_lost_one or (epoch + 1) % self.settings.kmeans_every_epochs == 0:
            result = kmeans(z, self.settings.n_clusters, self.learner.seed, init=mu.detach())
            mu.copy_(result.centroids)
            self.labels = result.labels
            self.counts.fill_(float(self.settings.initial_count))
        self.convergence.look(self.labels, z, mu, (epoch + 1) * self.steps_per_epoch)
        return super().after_epoch(epoch)
