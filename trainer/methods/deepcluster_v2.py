"""DeepCluster-v2: several spherical k-means on embeddings kept from the last epoch, their centroids are the classifier; `method.name: deepcluster_v2`.

Source: Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
2020, arXiv 2006.09882, appendix, and the authors' main_deepclusterv2.py. With u = L2(projector(encoder(aug(x)))):
    bank_v[i] = u of view v of image i, from the epoch before        mu_h, c_h = spherical k-means of bank_(h mod 2)
    L = mean over views and heads h of CE(u mu_h^T / temperature, c_h[i]);  mu_h is fixed until the next clustering
No head reset, no balanced sampling, no PCA. Differs from the code: Adam instead of LARC; all views have the same size (`views`), changed
as `augment:` says; an empty cluster restarts at the farthest point instead of keeping its place.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from trainer.clustering.kmeans import KMeansOptions, kmeans
from trainer.errors import DataError
from trainer.learner import Learner
from trainer.methods.head import head_state, load_head, own_draws
from trainer.methods.pseudo_label import (
    PseudoLabelMethod,
    PseudoLabelSettings,
    check_distinct_features,
    check_pseudo_clusters,
    filled_share,
)
from trainer.stage import OptimizerSettings

BANKS = 2


class DeepClusterV2Settings(PseudoLabelSettings):
    """`heads` clusterings with `pseudo_clusters` each; `views` of every image share its labels; `projector`: widths of its two layers."""

    name: Literal["deepcluster_v2"] = "deepcluster_v2"
    pseudo_clusters: int = Field(100, ge=2)
    heads: int = Field(3, ge=1)
    views: int = Field(2, ge=2)
    projector: tuple[PositiveInt, PositiveInt] = (512, 128)
    temperature: float = Field(0.1, gt=0)
    iterations: int = Field(10, ge=1, description="of k-means")
    optimizer: OptimizerSettings = OptimizerSettings(kind="adam", lr=1e-3, weight_decay=1e-6)


class DeepClusterV2(PseudoLabelMethod):
    """`banks` (2, N, D) hold the last embeddings of two views; `labels` (H, N) and `prototypes` (H, K, D) are of the last clustering."""

    Settings = DeepClusterV2Settings
    title = "DeepCluster-v2: several spherical k-means, prototypes as classifier (Caron et al. 2020)"
    settings: DeepClusterV2Settings
    kept: ClassVar[tuple[str, ...]] = ("ids", "spread", "banks", "labels", "prototypes")

    def __init__(self, settings: DeepClusterV2Settings, learner: Learner, batch_size: int) -> None:
        super().__init__(settings, learner, batch_size)
        check_pseudo_clusters(settings.pseudo_clusters, len(learner))
        if len(learner) // self.steps_per_epoch < 2:
            raise DataError(
                f"train.batch_size is {batch_size}, which cuts {len(learner)} training images into batches of one, but the projector of "
                f"deepcluster_v2 normalises over a batch; expected batches of at least 2"
            )
        hidden, dim = settings.projector
        with own_draws(learner.seed):
            first = nn.Linear(learner.model.encoder.out_dim, hidden)
            self.projector = nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.projector.to(learner.device)
        n, k, heads = len(learner), settings.pseudo_clusters, settings.heads
        self.banks = torch.zeros(BANKS, n, dim, device=learner.device)
        self.labels = torch.zeros(heads, n, dtype=torch.int64, device=learner.device)
        self.prototypes = torch.zeros(heads, k, dim, device=learner.device)

    def modules(self) -> list[nn.Module]:
        return [*super().modules(), self.projector]

    def embed(self, index: Tensor) -> Tensor:
        """U (B, D), of unit length, of a changed view of samples `index`."""
        return nn.functional.normalize(self.projector(self.learner.features(index)), dim=1)

    @torch.no_grad()
    def begin(self) -> None:
        """Fills the banks: there is no epoch before the first."""
        for module in self.modules():
            module.train()  # as in training: batch statistics, changed views
        parts = torch.arange(len(self.learner), device=self.learner.device).tensor_split(self.steps_per_epoch)
        for bank in self.banks:
            for part in parts:
                bank[part] = self.embed(part)
        for module in self.modules():
            module.eval()

    @torch.no_grad()
    def relabel(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        options = self.settings
        how = KMeansOptions(n_init=1, max_iterations=options.iterations, init="random", spherical=True)
        scatters = []
        for head in range(options.heads):
            bank, seed = self.banks[head % BANKS], self.learner.seed + epoch * options.heads + head
            if head == 0:
                self.watch(bank, epoch)
            check_distinct_features(bank, options.pseudo_clusters, epoch)
            found = kmeans(bank, options.pseudo_clusters, seed, how)
            self.labels[head], self.prototypes[head] = found.labels, found.centroids
            scatters.append(found.inertia / len(bank))
        filled = min(filled_share(labels, options.pseudo_clusters) for labels in self.labels)
        figures = {"scatter": sum(scatters) / len(scatters), "filled": filled}
        self.note(self.labels[0].clone(), options.pseudo_clusters, epoch, figures)

    def loss(self, index: Tensor) -> Tensor:
        """Cross-entropy over all views and heads; the embeddings of the first two views replace the bank's."""
        labels = self.labels[:, index]  # (H, B)
        losses = []
        for view in range(self.settings.views):
            u = self.embed(index)
            if view < BANKS:
                self.banks[view, index] = u.detach()
            logits = torch.einsum("bd,hkd->hkb", u, self.prototypes) / self.settings.temperature
            losses.append(nn.functional.cross_entropy(logits.transpose(1, 2).flatten(0, 1), labels.flatten()))
        return torch.stack(losses).mean()

    def state(self) -> dict[str, Tensor]:
        return super().state() | head_state(self.projector)

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        load_head(self.projector, state)
