"""What the methods that move the embeddings towards centroids have in common: where these start, and being watched until all rests.

`init` of the centroids: `kmeans`; `spectral`, centroids that reproduce a normalised cut of the neighbour graph as well as centroids can
(clustering/spectral.py, clustering/boundary.py), from at most `MAX_GRAPH` samples; `random` samples, no two alike; `uniform` in [-1, 1].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from trainer import ranks
from trainer.clustering.boundary import fit_boundary
from trainer.clustering.kmeans import check_distinct
from trainer.clustering.smoothing import distinct
from trainer.clustering.spectral import spectral_clustering
from trainer.convergence import Convergence
from trainer.methods.staged import StagedMethod, StagedSettings
from trainer.stage import EpochReport

MAX_GRAPH = 100_000  # samples: a graph costs the square of their number, K centroids do not need more
PULL = 0.01  # to the means of a cut's clusters, smoothed_kmeans's own


class TrainedSettings(StagedSettings):
    """`init` of the centroids."""

    init: Literal["kmeans", "spectral", "random", "uniform"] = "kmeans"


class TrainedMethod(StagedMethod):
    """A staged method that ends when its assignments have come to rest; subclasses set `convergence`."""

    settings: TrainedSettings
    convergence: Convergence

    @torch.no_grad()
    def init_centroids(self) -> None:
        """As `init` says; drawn by the seed."""
        if self.settings.init == "kmeans":
            super().init_centroids()
            return
        mu = self.learner.model.centroids
        generator = torch.Generator().manual_seed(self.learner.seed)
        if self.settings.init == "uniform":
            mu.copy_(torch.rand(mu.shape, generator=generator) * 2 - 1)
            return
        z = self.learner.all_latents()
        self.convergence.check(z)
        order = torch.randperm(len(z), generator=generator).to(z.device)
        if self.settings.init == "random":
            check_distinct(z, len(mu))
            mu.copy_(distinct(z[order])[0][: len(mu)])
        else:
            mu.copy_(ranks.current().same(lambda: self._of_a_cut(z[order[:MAX_GRAPH].sort().values])))

    def _of_a_cut(self, z: Tensor) -> Tensor:
        """Centroids (K, D) of a normalised cut of z (N, D)."""
        k = self.settings.n_clusters
        return fit_boundary(z, spectral_clustering(z, k, self.learner.seed, self.settings.n_init).labels, k, PULL)

    @torch.no_grad()
    def begin(self) -> None:
        """The starting spread, and whatever else is fixed at the start."""
        z = self.learner.all_latents()
        self.convergence.begin(z)
        self.start(z)

    def start(self, z: Tensor) -> None:
        """Fixes what the method needs of the first embeddings z (N, D)."""

    def after_epoch(self, epoch: int) -> EpochReport:
        """The log's figures, and whether the assignments have come to rest."""
        return EpochReport(self.convergence.figures, stop=self.convergence.is_reached)

    def state(self) -> dict[str, Tensor]:
        return super().state() | self.convergence.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.convergence.load_state(state)
