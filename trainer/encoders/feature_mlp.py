"""A small autoencoder on frozen pretrained features, so that the autoencoder methods reach textured parts; `encoder.name: feature_mlp`.

Source: Xie et al. 2016 (arXiv 1511.06335) and Guo's DEC-keras cluster images by hand-made or pretrained features through the
d-500-500-2000-10 network, since autoencoders of raw pixels fail on natural images. Differs from both: the features are projected
first (signed square root, PCA with a whitening exponent, L2), which sets their scale once for every backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.encoders.base import EncoderSettings, Shape
from trainer.encoders.mlp import MLPEncoder, MLPSettings
from trainer.encoders.pretrained import PretrainedEncoder, PretrainedSettings
from trainer.errors import DataError
from trainer.projection import Projection, ProjectionSettings


class FeatureMLPSettings(EncoderSettings):
    """`input` projects the backbone's features; it is fitted once, before training, and scaled to a mean square of 1 (DEC's rule)."""

    name: Literal["feature_mlp"] = "feature_mlp"
    backbone: PretrainedSettings
    input: ProjectionSettings = ProjectionSettings(kind="pca", dim=64, whiten=0.25, sqrt=True, l2=True)
    hidden: tuple[int, ...] = (500, 500, 2000)
    dim: int = Field(10, ge=1)


class FeatureMLPEncoder(MLPEncoder):
    """x (B, C, H, W) -> frozen features, projected, of unit mean square (B, D, 1, 1) -> MLP -> features (B, dim)."""

    Settings = FeatureMLPSettings  # type: ignore[assignment]
    has_frozen = True
    gain: Tensor

    def __init__(self, settings: FeatureMLPSettings, shape: Shape) -> None:
        if settings.backbone.trainable or settings.input.kind == "within" or settings.input.learn:
            raise DataError(
                "encoder.backbone.trainable, encoder.input.learn and encoder.input.kind within do not fit encoder feature_mlp, "
                "whose input is frozen; expected trainable: false, learn: false and kind pca or none"
            )
        backbone = PretrainedEncoder(settings.backbone, shape)
        projection = Projection(settings.input, backbone.out_dim, backbone.out_dim + 1)
        super().__init__(MLPSettings(hidden=settings.hidden, dim=settings.dim), (projection.out_dim, 1, 1))
        self.settings = settings  # type: ignore[assignment]
        self.backbone, self.input = backbone, projection
        self.map_layers = backbone.map_layers
        self.register_buffer("gain", torch.ones(()))

    def frozen(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def stem(self, x: Tensor) -> Tensor:
        return (self.input.to_cluster_space(self.input(x)) * self.gain)[:, :, None, None]

    def with_maps(self, x: Tensor, layers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        features, maps = self.backbone.with_maps(x, layers)
        return self.head(self.stem(features)), maps

    def train(self, mode: bool = True) -> FeatureMLPEncoder:
        super().train(mode)
        self.backbone.eval()  # its batch statistics are part of the pretrained weights
        return self

    def load_pretrained(self) -> None:
        self.backbone.load_pretrained()

    @torch.no_grad()
    def fit_stem(self, features: Tensor) -> None:
        if self.input.settings.kind == "pca" and len(features) <= self.input.out_dim:
            raise DataError(
                f"encoder.input.dim is {self.input.out_dim}, but there are {len(features)} training images, expected more of them"
            )
        self.input.fit(features, n_clusters=1, seed=0)
        x = self.input.to_cluster_space(self.input(features))
        self.gain.copy_(x.square().mean().clamp_min(1e-12).rsqrt())
