"""DeepCluster: k-means on whitened features gives labels, the encoder learns them on changed images, in turns; `method.name: deepcluster`.

Source: Caron, Bojanowski, Joulin, Douze, "Deep Clustering for Unsupervised Learning of Visual Features", 2018, arXiv 1807.05520, eq. 1, 2
and section 3, and the authors' code. Before every epoch:
    h_i = encoder(x_i), as it is        z_i = L2(whiten(PCA(h_i)))        c_i = argmin_k |z_i - mu_k|^2
    L = mean_i CE(W relu(encoder(aug(x_i))) + b, c_i), samples drawn so that every cluster comes equally often; W, b start anew
Differs from the code: the encoder is any of ours; a cluster below max(3, `min_share` N / K) joins its nearest larger one, where the code
repeats its few images ever so often; whitening has a floor; `augment:` takes the place of random crops, which can cut a defect away.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.clustering.kmeans import KMeansOptions, kmeans
from trainer.distance import squared_distances_matmul
from trainer.feature_store import FeatureStore
from trainer.learner import Learner
from trainer.methods.head import LinearHead, head_state, load_head, own_draws
from trainer.methods.pseudo_label import (
    PseudoLabelMethod,
    PseudoLabelSettings,
    check_distinct_features,
    check_pseudo_clusters,
)
from trainer.projection import Projection, ProjectionSettings
from trainer.samplers import balanced

PCA_SAMPLE = 100_000  # rows that the principal directions are found from: of a larger set they are the same
SMALLEST = 3


class DeepClusterSettings(PseudoLabelSettings):
    """`pseudo_clusters`: K of the pseudo-labels, 5 to 20 times the kinds expected; `n_clusters` is of the closing k-means.

    `pca_dim` is at most the features' number and one less than the images'.
    """

    name: Literal["deepcluster"] = "deepcluster"
    pseudo_clusters: int = Field(100, ge=2)
    pca_dim: int = Field(256, ge=1)
    iterations: int = Field(20, ge=1, description="of k-means")
    min_share: float = Field(0.1, ge=0, lt=1)


class DeepCluster(PseudoLabelMethod):
    """The original form: one hard label per image, one linear head that starts anew with every clustering."""

    Settings = DeepClusterSettings
    title = "DeepCluster: k-means pseudo-labels (Caron et al. 2018)"
    settings: DeepClusterSettings

    def __init__(self, settings: DeepClusterSettings, learner: Learner, batch_size: int) -> None:
        super().__init__(settings, learner, batch_size)
        check_pseudo_clusters(settings.pseudo_clusters, len(learner))
        with own_draws(learner.seed):
            self.head = LinearHead(learner.model.encoder.out_dim, settings.pseudo_clusters).to(learner.device)

    def renewed(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    @torch.no_grad()
    def relabel(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        options, n = self.settings, len(self.learner)
        store = self.learner.stored_features("features")
        self.watch(store.whole(), epoch)
        z = whitened(store, options.pca_dim).to(self.learner.device)
        check_distinct_features(z, options.pseudo_clusters, epoch)
        how = KMeansOptions(n_init=1, max_iterations=options.iterations, init="random")
        # Another seed in every epoch: with the same one, the same images would found the clusters again and again.
        found = kmeans(z, options.pseudo_clusters, self.learner.seed + epoch, how)
        labels = merged(
            found.labels, found.centroids, max(SMALLEST, int(options.min_share * n / options.pseudo_clusters))
        )
        self.note(labels, options.pseudo_clusters, epoch, {"scatter": found.inertia / n})
        self.head.renew(optimizer)

    def order(self, generator: torch.Generator) -> Tensor:
        return balanced(self.ids, generator)

    def loss(self, index: Tensor) -> Tensor:
        """Cross-entropy with the pseudo-labels."""
        return nn.functional.cross_entropy(self.head(self.learner.features(index)), self.ids[index])

    def state(self) -> dict[str, Tensor]:
        return super().state() | head_state(self.head)

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        load_head(self.head, state)


def whitened(store: FeatureStore, dim: int) -> Tensor:
    """Z (N, p) of unit length from features (N, F): PCA to p <= `dim`, variances divided out (with a floor)."""
    features = store.whole()
    sample = features[:: -(-len(features) // PCA_SAMPLE)]
    projection = Projection(
        ProjectionSettings(kind="pca", dim=dim, whiten=0.5, l2=True), features.shape[1], len(sample)
    )
    projection.fit(sample, n_clusters=1, seed=0)
    return torch.cat([projection.to_cluster_space(projection(part)) for part in features.split(8192)])


def merged(labels: Tensor, mu: Tensor, smallest: int) -> Tensor:
    """Labels (N,) in which the members of clusters with fewer than `smallest` have joined the nearest cluster that has enough; mu (K, D).

    Where none has enough, all stay.
    """
    sizes = torch.bincount(labels, minlength=len(mu))
    small = sizes < smallest
    if bool(small.all()):
        return labels
    d2 = squared_distances_matmul(mu, mu, mu.mean(0)).masked_fill(small[None, :], float("inf"))
    target = torch.where(small, d2.argmin(1), torch.arange(len(mu), device=mu.device))
    return target[labels]
