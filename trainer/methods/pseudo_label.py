"""What the DeepCluster family has in common: pseudo-labels from clustering the features, a head that learns them, a closing k-means.

Every `relabel_every_epochs` the features of the images as they are get clustered, the ids become labels, and the encoder learns to
tell them apart on changed images. The last labels are not the result: k-means with the user's K on the learned features is.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from trainer.clustering.kmeans import distinct_rows
from trainer.errors import CollapseError, DataError
from trainer.guards import ClusterGuard
from trainer.learner import Learner
from trainer.methods.staged import StagedMethod, StagedSettings
from trainer.metric import effective_clusters
from trainer.stage import EpochReport, OptimizerSettings, figures_of, figures_state

MIN_EFFECTIVE_SHARE = 0.2  # of the pseudo-clusters; below it they have merged, and the head learns next to nothing
LOG = "pseudo_labels"


class PseudoLabelSettings(StagedSettings):
    """`relabel_every_epochs` between two clusterings; from `stop_relabel_epoch` on the labels stay."""

    epochs: int = Field(100, ge=1)
    relabel_every_epochs: int = Field(1, ge=1)
    stop_relabel_epoch: int | None = Field(None, ge=1)
    optimizer: OptimizerSettings = OptimizerSettings(kind="sgd", lr=0.05, weight_decay=1e-5)


class PseudoLabelMethod(StagedMethod):
    """Subclasses give `relabel`; `ids` (N,) are those of the last clustering, -1 before the first.

    `spread` is the variance of the features at the first clustering. `needs_filled`: few pseudo-clusters holding all are a collapse.
    """

    needs_filled: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ("ids", "spread")
    settings: PseudoLabelSettings

    def __init__(self, settings: PseudoLabelSettings, learner: Learner, batch_size: int) -> None:
        super().__init__(settings, learner, batch_size)
        self.need_trainable()
        self.refuse_learned_projection()
        self.epochs = settings.epochs
        self.spread = torch.tensor(0.0, device=learner.device)
        self.ids = torch.full((len(learner),), -1, device=learner.device)
        self._figures: dict[str, float] = {}

    def init_centroids(self) -> None:
        """None before the end."""

    def relabel(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Clusters the features as they are now; calls `note` with the ids."""
        raise TypeError(f"{type(self).__name__} has no relabel")

    def is_due(self, epoch: int) -> bool:
        """Whether the features are clustered before `epoch`."""
        stop = self.settings.stop_relabel_epoch
        return epoch % self.settings.relabel_every_epochs == 0 and (epoch == 0 or stop is None or epoch < stop)

    @torch.no_grad()
    def before_epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if self.is_due(epoch):
            self.relabel(epoch, optimizer)

    def watch(self, features: Tensor, epoch: int) -> None:
        """Takes the features (N, F) that are about to be clustered.

        Raises:
            CollapseError: their variance is gone, or they are not finite.
        """
        if epoch == 0:
            self.spread = features.var(0, unbiased=False).sum()
        k = self.settings.n_clusters
        ClusterGuard(k, float(self.spread), k).check_embeddings(features)

    def note(self, ids: Tensor, n_clusters: int, epoch: int, figures: dict[str, float]) -> None:
        """Takes the ids (N,) of a clustering with `n_clusters`: the log's figures, the file of ids, the guard.

        Raises:
            CollapseError: a few clusters hold nearly all.
        """
        filled = figures.get("filled", filled_share(ids, n_clusters))
        self._figures = {**figures, "filled": filled}
        if int(self.ids.min()) >= 0:
            # Against the labels before, not against the truth: it should rise, and stay below 1.
            self._figures["nmi_previous"] = float(normalized_mutual_info_score(self.ids.cpu(), ids.cpu()))
        self.ids = ids
        self._write_log(epoch, ids.cpu().numpy().astype(np.int32))
        if self.needs_filled and filled < MIN_EFFECTIVE_SHARE:
            raise CollapseError(
                "guard filled",
                f"the {n_clusters} pseudo-clusters of epoch {epoch + 1} are as good as {filled * n_clusters:.1f}: a few hold nearly all "
                f"images; use fewer pseudo-clusters, more augmentation, a better start (pretrain) or a lower learning rate",
            )

    def _write_log(self, epoch: int, ids: NDArray[np.int32]) -> None:
        if self.learner.options.folder is not None:
            folder = self.learner.options.folder / LOG
            folder.mkdir(exist_ok=True)
            np.save(folder / f"{epoch:04}.npy", ids)

    def after_epoch(self, epoch: int) -> EpochReport:
        return EpochReport(self._figures)

    @torch.no_grad()
    def end(self) -> None:
        """k-means with the user's K on the learned features, in a projection fitted to them."""
        model = self.learner.model
        model.projection.fit(self.learner.all_features(), self.settings.n_clusters, self.learner.seed)
        super().init_centroids()

    def state(self) -> dict[str, Tensor]:
        return super().state() | figures_state(self._figures)

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self._figures = figures_of(state)


def filled_share(ids: Tensor, n_clusters: int) -> float:
    """Effective number of clusters among ids (N,), as a share of `n_clusters`."""
    return effective_clusters(torch.bincount(ids, minlength=n_clusters).double().cpu().numpy()) / n_clusters


def check_pseudo_clusters(count: int, n: int) -> None:
    """Refuses more pseudo-clusters than half the `n` training images.

    Raises:
        DataError: so it is.
    """
    if count * 2 > n:
        raise DataError(
            f"method.pseudo_clusters is {count}, but there are {n} training images, expected at least two for each pseudo-cluster; "
            f"5 to 20 times the kinds of parts, and 20 images for each, are a good start"
        )


def check_distinct_features(z: Tensor, count: int, epoch: int) -> None:
    """Refuses rows z (N, D) of which fewer than `count` are different.

    Raises:
        DataError: in the first epoch, where the images are to blame.
        CollapseError: later, where training is.
    """
    distinct = distinct_rows(z, count)
    if distinct >= count:
        return
    if epoch == 0:
        raise DataError(
            f"method.pseudo_clusters is {count}, but the {len(z)} training images have only {distinct} different features; "
            f"use fewer pseudo-clusters or more images"
        )
    raise CollapseError(
        "guard spread",
        f"the {len(z)} images have only {distinct} different features left in epoch {epoch + 1}, for {count} pseudo-clusters; lower the "
        f"learning rate, or use more augmentation",
    )
