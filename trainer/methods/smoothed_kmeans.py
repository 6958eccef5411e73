"""k-means on embeddings smoothed over shared nearest neighbours, held in centroids that one frame can be compared with.

`method.name: smoothed_kmeans`. Sources: clustering/smoothing.py (the graph), clustering/boundary.py (the centroids). Three steps:
1. all training parts are smoothed over their graph, k-means on the smoothed embeddings assigns them;
2. centroids in the UNSMOOTHED cluster space are learned so that the nearest one reproduces this assignment;
3. to know whether it does for a new part, both steps run before on a share of the parts, and the others are asked.
The centroids that are kept come from all parts; the agreement is that of the same procedure with `holdout` fewer. The projection is
left as it was fitted, so novelty is measured in the same space as with ae_kmeans.
"""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.clustering.boundary import fit_boundary
from trainer.clustering.kmeans import KMeansOptions, kmeans
from trainer.clustering.matching import label_names
from trainer.clustering.smoothing import Smoothed, SmoothingOptions, extend, smooth
from trainer.distance import nearest
from trainer.errors import DataError
from trainer.learner import Learner
from trainer.methods.base import Method
from trainer.methods.staged import SeveralClustersSettings


class SmoothedKMeansSettings(SeveralClustersSettings):
    """`holdout` of the training parts stay outside the graph while the agreement is measured; below `min_agreement` there is a warning."""

    name: Literal["smoothed_kmeans"] = "smoothed_kmeans"
    n_init: int = Field(10, ge=1, description="k-means restarts")
    neighbours: int = Field(15, ge=2, description="nearest neighbours of each part in the graph")
    min_jaccard: float = Field(0.05, ge=0, lt=1, description="weights below it are dropped")
    steps: int = Field(10, ge=0)
    anchor: float = Field(0.1, gt=0, le=1, description="share of its own position that a part keeps in every step")
    pull: float = Field(0.01, gt=0, description="how strongly the centroids are held at the class means")
    holdout: float = Field(0.2, ge=0, le=0.5, description="share of the parts to measure the agreement on; 0 skips it")
    min_agreement: float = Field(0.95, ge=0, le=1)


class SmoothedKMeans(Method):
    """Nothing trains: all of it happens before the first stage."""

    Settings = SmoothedKMeansSettings
    title = "k-means after smoothing over shared nearest neighbours, held in learned centroids"
    settings: SmoothedKMeansSettings

    def __init__(self, settings: SmoothedKMeansSettings, learner: Learner, batch_size: int) -> None:
        super().__init__(settings, learner, batch_size)
        self._figures: dict[str, float] = {}

    @torch.no_grad()
    def init_centroids(self) -> None:
        z = self.learner.all_latents()
        labels = self._smoothed_assignment(z)[1]
        centroids = fit_boundary(z, labels, self.settings.n_clusters, self.settings.pull)
        self.learner.model.centroids.copy_(centroids)
        self._figures = {"agreement_train": _share_equal(nearest(z, centroids)[0], labels)}
        held_out = round(self.settings.holdout * len(z))
        if held_out and len(z) - held_out >= 2 * self.settings.n_clusters:
            # The parts that stay may be too few different ones for K clusters, where nearly all are alike.
            with contextlib.suppress(DataError):
                self._figures.update(self._agreement(z, labels, held_out))

    def figures(self) -> dict[str, float]:
        """`agreement` on held-out parts with the smoothed assignment carried to them; `agreement_rerun` with smoothing run again with them in the graph.

        `agreement_means` is what class means in place of the learned centroids would give; `agreement_train` is on the training parts.
        """
        return dict(self._figures)

    def warnings(self) -> list[str]:
        agreement = self._figures.get("agreement")
        if agreement is None:
            if not self._figures:
                return []
            return [
                f"method smoothed_kmeans held no parts out (method.holdout {self.settings.holdout:g} of {len(self.learner)} parts, or too few "
                f"different others): "
                f"whether a new part gets the cluster that smoothing would give it is not known"
            ]
        if agreement >= self.settings.min_agreement:
            return []
        return [
            f"method smoothed_kmeans: nearest centroid gives only {agreement:.1%} of held-out parts the cluster that smoothing gives "
            f"them, expected at least {self.settings.min_agreement:.1%} (method.min_agreement); the model on the line answers otherwise "
            f"than the clustering shows: use more images, fewer method.steps, or method ae_kmeans"
        ]

    def _smoothed_assignment(self, z: Tensor) -> tuple[Smoothed, Tensor, Tensor]:
        """The graph of z (N, D), the assignment (N,) of its points, the centroids (K, D) in smoothed space."""
        options = self.settings
        graph = smooth(z, SmoothingOptions(options.neighbours, options.min_jaccard, options.steps, options.anchor))
        found = kmeans(
            torch.from_numpy(graph.all_smoothed),
            options.n_clusters,
            self.learner.seed,
            KMeansOptions(n_init=options.n_init),
        )
        return graph, found.labels.to(z.device), found.centroids

    def _agreement(self, z: Tensor, labels: Tensor, held_out: int) -> dict[str, float]:
        """What the same procedure on the other parts answers for `held_out` of z (N, D); `labels` (N,) of smoothing them all."""
        k = self.settings.n_clusters
        order = torch.randperm(len(z), generator=torch.Generator().manual_seed(self.learner.seed)).to(z.device)
        out, rest = order[:held_out], order[held_out:]
        graph, known, smoothed_centroids = self._smoothed_assignment(z[rest])
        expected = nearest(torch.from_numpy(extend(graph, z[out])), smoothed_centroids)[0].to(z.device)
        answers, by_means = (
            nearest(z[out], fit_boundary(z[rest], known, k, pull))[0] for pull in (self.settings.pull, float("inf"))
        )
        # The two runs number their clusters differently; parts that both have seen say which is which.
        rerun = label_names(known, labels[rest], k)[labels[out]]
        return {
            "agreement": _share_equal(answers, expected),
            "agreement_rerun": _share_equal(answers, rerun),
            "agreement_means": _share_equal(by_means, expected),
        }


def _share_equal(a: Tensor, b: Tensor) -> float:
    return float((a == b).double().mean())
