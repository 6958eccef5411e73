"""The fused model that is traced into one ONNX graph, from camera pixels to novelty.

Symbols: N frames, H x W pixels of the ROI, C h w the encoder's input, F features, K clusters, D embedding size, M calibration parts.

    image uint8 (N,H,W,3)
      | Preprocess          trainer/preprocess.py: fit, resize (exact integer steps of a fixed frame: exporters/downscaling.py)
    pixels uint8 (N,h,w,3)
      | Cast, normalise     folded into the first convolution by exporters/folding.py
    x (N,C,h,w)
      | Encoder             trainer/encoders
    features (N,F)
      | Projection          trainer/projection.py: [signed sqrt], (x - mean) W^T
    embedding (N,D) ------------------------------------------------.
      | [L2]                                                         |
    cluster space (N,D)                                              |
      | distances to centroids*                                      |
    distances (N,K) --ArgMin--> cluster_id (N) --Gather--> cluster_mean*[id]
      | ReduceMin                    |                               |
    distance (N)                     '-Gather-> cluster_radius*[id]  |
                                                     | s = ||embedding - mean|| / radius  (N)
      (bank: maps of inner layers (N,C_l,h_l,w_l) --trainer/bank--> novelty_map (N,h,w) --> patch_score (N); s = max(s, patch_score))
              calibration*, calibration_weight* --> p_value = (1 + sum w [c >= s]) / (1 + sum w)
              novelty_scale* --> novelty_score = s / scale --> is_novel = score > novelty_threshold*

    * overridable: an input with an initialiser. They are traced as inputs, so that no constant folding can touch them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_dkm.contract import FEATURES, MAP, OUTPUTS, PATCH_OUTPUTS, PIXELS, TensorSpec
from trainer import novelty
from trainer.distance import DIRECT_LIMIT, squared_distances_matmul
from trainer.model import ClusterModel


class FusedModel(nn.Module):
    """The whole graph as one module; argument and result order is that of edge_dkm.contract."""

    centre: Tensor | None

    def __init__(self, model: ClusterModel) -> None:
        super().__init__()
        self.model = model
        # A constant of the base codebook: it stays when a station's codebook replaces the centroids.
        self.register_buffer("centre", _centre(model.centroids.detach()))

    @property
    def seams(self) -> tuple[str, ...]:
        """Names of the inner tensors that `with_seams` gives first: where the encoder begins and ends."""
        return (PIXELS, FEATURES, *(f"{MAP}{layer}" for layer in self._layers))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `forward` gives."""
        return OUTPUTS if self.model.bank is None else OUTPUTS + PATCH_OUTPUTS

    @property
    def _layers(self) -> tuple[str, ...]:
        return () if self.model.bank is None else self.model.bank.settings.layers

    def forward(self, image: Tensor, novelty_threshold: Tensor, *codebook: Tensor) -> tuple[Tensor, ...]:
        return self.with_seams(image, novelty_threshold, *codebook)[len(self.seams) :]

    def with_seams(self, image: Tensor, novelty_threshold: Tensor, *codebook: Tensor) -> tuple[Tensor, ...]:
        """The `seams`, then the outputs of `forward`."""
        centroids, cluster_mean, cluster_radius, novelty_scale, calibration, calibration_weight = codebook
        model = self.model
        pixels = model.preprocess.geometry(image)  # (N, h, w, 3)
        features, maps = self._encode(model.preprocess.normalise(pixels))  # (N, F)
        embedding = model.projection(features)  # (N, D)
        distances = self._distances(model.projection.to_cluster_space(embedding), centroids)  # (N, K)
        distance, cluster_id = distances.min(1)
        patches = () if model.bank is None else model.bank(maps, self._own_clusters(embedding, cluster_id))
        apart = novelty.novelty_distance(embedding, cluster_mean, cluster_id)
        s = novelty.raw_score(apart, cluster_radius, cluster_id, *patches[:1])
        novelty_score = s / novelty_scale
        p_value = novelty.p_value(s, calibration, calibration_weight)
        is_novel = novelty_score > novelty_threshold
        seams = (pixels, features, *maps.values())
        return (*seams, cluster_id, distance, novelty_score, p_value, is_novel, distances, embedding, *patches)

    def _own_clusters(self, embedding: Tensor, cluster_id: Tensor) -> Tensor:
        """By the model's own centroids, so that no codebook changes what a bank per cluster says."""
        if self.model.bank is None or not self.model.bank.settings.per_cluster:
            return cluster_id
        own = self.model.centroids.detach()
        return self._distances(self.model.projection.to_cluster_space(embedding), own).argmin(1)

    def _encode(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.model.bank is None:
            return self.model.encoder(x), {}
        return self.model.encoder.with_maps(x, self._layers)

    def _distances(self, z: Tensor, centroids: Tensor) -> Tensor:
        if self.model.centroids.numel() <= DIRECT_LIMIT:
            return torch.linalg.vector_norm(z[:, None, :] - centroids, dim=-1)
        return squared_distances_matmul(z, centroids, self.centre).sqrt()

    def overridable(self) -> dict[str, Tensor]:
        """The initial values of the overridable inputs, in the order of `forward`."""
        model = self.model
        return {
            "novelty_threshold": torch.ones(1),
            "centroids": model.centroids.detach(),
            "cluster_mean": model.cluster_mean,
            "cluster_radius": model.cluster_radius,
            "novelty_scale": model.novelty_scale,
            "calibration": model.calibration,
            "calibration_weight": model.calibration_weight,
        }


def _centre(centroids: Tensor) -> Tensor | None:
    """Mean (D,) of centroids (K, D), or None where they lie around the origin, as after PCA: moving all of them takes a third of the head's time."""
    centre = centroids.mean(0)
    is_near = centre.square().sum() <= (centroids - centre).square().sum(1).mean()
    return None if is_near else centre
