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
from trainer.clustering.kmeans import too_few_different
from trainer.clustering.spectral import spectral_clustering
from trainer.convergence import Convergence
from trainer.learner import Learner
from trainer.methods.staged import StagedMethod, StagedSettings
from trainer.stage import EpochReport

MAX_GRAPH = 100_000  # samples: a graph costs the square of their number, K centroids do not need more
SAME = 1e-4  # of the embeddings' spread: samples nearer than that are alike
PULL = 0.01  # to the means of a cut's clusters, smoothed_kmeans's own


class TrainedSettings(StagedSettings):
    """`init` of the centroids."""

    init: Literal["kmeans", "spectral", "random", "uniform"] = "kmeans"


class TrainedMethod(StagedMethod):
    """A staged method that ends when its assignments have come to rest; subclasses set `convergence`.

    `error` (2,): the squared error of the epoch's reconstructions so far, and of how many images.
    """

    settings: TrainedSettings
    convergence: Convergence

    def __init__(self, settings: TrainedSettings, learner: Learner, batch_size: int) -> None:
        super().__init__(settings, learner, batch_size)
        self.found_no_cut = torch.tensor(False)
        self.error = torch.zeros(2, dtype=torch.float64, device=learner.device)

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
        order = torch.randperm(len(z), generator=generator).to(z.device)
        if self.settings.init == "random":
            mu.copy_(different_samples(z[order], len(mu)))
            return
        found = ranks.current().same(lambda: self._of_a_cut(z[order[:MAX_GRAPH].sort().values]))
        if found is None:
            self.found_no_cut.fill_(True)
            super().init_centroids()
        else:
            mu.copy_(found)

    def _of_a_cut(self, z: Tensor) -> Tensor | None:
        """Centroids (K, D) of a normalised cut of z (N, D), where there is one."""
        k = self.settings.n_clusters
        cut = spectral_clustering(z, k, self.learner.seed, self.settings.n_init)
        return None if cut is None else fit_boundary(z, cut.labels, k, PULL)

    def warnings(self) -> list[str]:
        if not self.found_no_cut:
            return []
        return [
            "method.init is spectral, but every cut of the neighbour graph had a cluster below a quarter of the even share, or the graph fell "
            "into more parts than clusters: centroids started from k-means; keep fewer frames of each shot, or change method.n_clusters"
        ]

    @torch.no_grad()
    def begin(self) -> None:
        """The starting spread, and whatever else is fixed at the start."""
        z = self.learner.all_latents()
        found_in_data = self.settings.init in {"kmeans", "spectral"}
        self.convergence.begin(z, self.learner.model.centroids if found_in_data else None)
        self.start(z)

    def start(self, z: Tensor) -> None:
        """Fixes what the method needs of the first embeddings z (N, D)."""

    def before_epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Begins to count the reconstruction's error."""
        self.error.zero_()

    def reconstruct(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) and squared errors (B,) of samples `index`, counted for the log."""
        z, error = self.learner.reconstruct(index)
        self.error[0] += error.detach().sum()
        self.error[1] += len(error)
        return z, error

    @property
    def looks(self) -> int:
        return self.convergence.looks

    def after_epoch(self, epoch: int) -> EpochReport:
        """The log's figures, and whether the assignments have come to rest."""
        return EpochReport(self.logged, stop=self.convergence.is_reached)

    @property
    def logged(self) -> dict[str, float]:
        """What the guards saw last, and the mean squared error per element of the epoch's reconstructions, where there were any."""
        error, images = self.error.tolist()
        reconstruction = {"reconstruction": error / images / self.learner.elements} if images else {}
        return {**reconstruction, **self.convergence.figures}

    def state(self) -> dict[str, Tensor]:
        return super().state() | self.convergence.state() | {"found_no_cut": self.found_no_cut, "error": self.error}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.convergence.load_state(state)
        self.found_no_cut = state["found_no_cut"]
        self.error = state["error"].to(self.learner.device)


def different_samples(z: Tensor, count: int) -> Tensor:
    """The first `count` of z (N, D) that lie apart, (count, D): equal centroids could not be told apart again.

    Raises:
        DataError: fewer do.
    """
    least = SAME**2 * z.var(0, unbiased=False).sum()
    free = torch.ones(len(z), dtype=torch.bool, device=z.device)
    chosen: list[int] = []
    while len(chosen) < count and free.any():
        chosen.append(int(free.int().argmax()))
        free &= (z - z[chosen[-1]]).square().sum(1) > least
    if len(chosen) < count:
        raise too_few_different(count, len(z), len(chosen))
    return z[chosen]
