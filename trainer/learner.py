"""The training side of a model: its training pixels on the device, batches of them, cached features of a frozen encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.model import PREDICT_BATCH, ClusterModel


class Learner:
    """`pixels`: (N, h, w, 3 or 1) training pixels. `decoder` exists while an autoencoder is pre-trained, else None."""

    def __init__(self, model: ClusterModel, pixels: Tensor, seed: int) -> None:
        self.model, self.seed = model, seed
        self.device = model.centroids.device
        self.pixels = pixels.to(self.device)
        self.decoder: nn.Module | None = None
        self._frozen_features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def inputs(self, index: Tensor) -> Tensor:
        """Normalised encoder inputs (B, C, h, w) of samples `index`."""
        return self.model.preprocess.normalise(self.pixels[index])

    def features(self, index: Tensor) -> Tensor:
        """Encoder features (B, F); from the cache where the encoder is frozen."""
        if self.model.encoder.is_trainable:
            return self.model.encoder(self.inputs(index))
        return self.all_features()[index]

    def latents(self, index: Tensor) -> Tensor:
        """Embeddings in cluster space (B, D), with gradients."""
        return self.model.projection.to_cluster_space(self.model.projection(self.features(index)))

    @torch.no_grad()
    def all_features(self) -> Tensor:
        """Features (N, F) of all training samples, in eval mode."""
        if self._frozen_features is not None:
            return self._frozen_features
        encoder = self.model.encoder
        was_training = encoder.training
        encoder.eval()
        indices = torch.arange(len(self), device=self.device)
        features = torch.cat([encoder(self.inputs(part)) for part in indices.split(PREDICT_BATCH)])
        encoder.train(was_training)
        if not encoder.is_trainable:
            self._frozen_features = features
        return features

    @torch.no_grad()
    def all_latents(self) -> Tensor:
        """Embeddings in cluster space (N, D) of all training samples, in eval mode."""
        return self.model.projection.to_cluster_space(self.model.projection(self.all_features()))
