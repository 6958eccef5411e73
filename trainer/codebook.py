"""What follows the last training stage: cluster means, radii, the calibration of novelty, the cluster table. Called by fit and by the exporter.

The scores of every calibration part are kept with cluster and group, so that the exporter can leave out clusters that the engineer
has since marked `reject`, and calibrate again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer import novelty
from trainer.clustering.kmeans import cluster_means
from trainer.errors import DataError
from trainer.model import ClusterModel, Seen
from trainer.novelty import Calibration, NoveltySettings


@dataclass(frozen=True)
class CalibrationParts:
    """Raw score, cluster id and group number of each calibration part (C,). `is_held_out` False: they are training parts (`novelty: none`)."""

    score: NDArray[np.float32]
    cluster: NDArray[np.int64]
    group: NDArray[np.int64]
    is_held_out: bool


@dataclass(frozen=True)
class Embedded:
    """What the model makes of the images of one part of the split, and their group numbers (N,)."""

    seen: Seen
    groups: NDArray[np.int64]

    @property
    def z(self) -> Tensor:
        """Embeddings before L2 (N, D)."""
        return self.seen.z


def finish(
    model: ClusterModel, train: Embedded, radius: Embedded | None, calibration: Embedded | None
) -> CalibrationParts:
    """Sets `cluster_mean` and `cluster_radius` and scores the calibration parts; without held-out parts, the training parts serve."""
    ids, _ = model.assign(train.z)
    means = cluster_means(train.z, ids, model.n_clusters)
    empty = torch.bincount(ids, minlength=model.n_clusters) == 0
    means[empty] = model.centroids.detach()[empty]
    model.cluster_mean.copy_(means)
    of_radius = radius or train
    radius_ids, _ = model.assign(of_radius.z)
    model.cluster_radius.copy_(
        novelty.radii(novelty.novelty_distance(of_radius.z, means, radius_ids), radius_ids, model.n_clusters)
    )
    scored = calibration or train
    s, scored_ids = model.raw_scores(scored.seen)
    return CalibrationParts(
        s.cpu().numpy().astype(np.float32), scored_ids.cpu().numpy(), scored.groups, calibration is not None
    )


def set_calibration(
    model: ClusterModel, parts: CalibrationParts, settings: NoveltySettings, rejected: frozenset[int] = frozenset()
) -> Calibration:
    """Calibrates on the parts outside the `rejected` clusters and stores scale, scores and weights in the model.

    Raises:
        DataError: no part is left.
    """
    keep = ~np.isin(parts.cluster, sorted(rejected))
    if not keep.any():
        raise DataError(
            f"all {len(keep)} calibration parts lie in clusters with the verdict reject ({sorted(rejected)}); "
            f"novelty cannot be calibrated: at least one cluster must be good"
        )
    calibration = novelty.calibrate(parts.score[keep], parts.group[keep], settings)
    device = model.centroids.device
    model.novelty_scale.fill_(calibration.scale)
    model.calibration = torch.from_numpy(calibration.scores).to(device)
    model.calibration_weight = torch.from_numpy(calibration.weights).to(device)
    return calibration


def cluster_table(
    model: ClusterModel, train: Embedded, parts: CalibrationParts, names: list[str] | None = None
) -> list[dict[str, Any]]:
    """One row per cluster: id, name, n training members, radius, and the quantiles .5 and .99 of the raw score of its parts.

    Args:
        names: of the clusters, where the method knows them.

    The quantiles are of held-out parts where the cluster has some, else of its training members.
    """
    of_train, ids = model.raw_scores(train.seen)
    scores = of_train.cpu().numpy()
    members = ids.cpu().numpy()
    rows = []
    for k in range(model.n_clusters):
        own = parts.score[parts.cluster == k] if (parts.cluster == k).any() else scores[members == k]
        q50, q99 = (float(np.quantile(own, q)) for q in (0.5, 0.99)) if len(own) else (0.0, 0.0)
        rows.append(
            {
                "id": k,
                "name": names[k] if names else f"cluster-{k}",
                "n": int((members == k).sum()),
                "radius": float(model.cluster_radius[k]),
                "q50": q50,
                "q99": q99,
            }
        )
    return rows
