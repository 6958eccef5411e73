"""A learner on warped blobs, without files: five kinds of points, bent into 8x8 grey images that an autoencoder has to straighten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.clustering.kmeans import KMeansOptions, kmeans
from trainer.encoders import ENCODERS
from trainer.encoders.base import EncoderSettings
from trainer.encoders.mlp import MLPSettings
from trainer.learner import Learner, LearnerOptions
from trainer.model import ClusterModel
from trainer.preprocess import Preprocess, PreprocessSettings
from trainer.projection import Projection, ProjectionSettings

SIDE_PX, KINDS = 8, 5


def warped_blobs(per_kind: int = 80, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (5 per_kind, 8, 8) and kinds (N,): ten-dimensional blobs through a random tanh layer."""
    rng = np.random.default_rng(seed)
    kinds = np.repeat(np.arange(KINDS), per_kind)
    z = rng.normal(0, 2, (KINDS, 10))[kinds] + rng.normal(0, 0.45, (len(kinds), 10))
    warped = np.tanh(z @ rng.normal(0, 0.25, (10, SIDE_PX * SIDE_PX)))
    return (127.5 + 127.5 * warped).astype(np.uint8).reshape(-1, SIDE_PX, SIDE_PX), kinds


def write_blobs(path: Path, per_kind: int = 80, seed: int = 0) -> Path:
    """The same as an .npz that `data.path` takes."""
    images, kinds = warped_blobs(per_kind, seed)
    np.savez(path, X=images, y=kinds)
    return path


def blob_learner(
    per_kind: int = 20, tiles: int = 1, encoder_settings: EncoderSettings | None = None, **options: Any
) -> Learner:
    """An untrained encoder of 6 features (an MLP) on warped blobs, centroids by k-means; each image `tiles` times beside and below itself."""
    torch.manual_seed(0)
    images, side_px = np.tile(warped_blobs(per_kind)[0], (1, tiles, tiles)), SIDE_PX * tiles
    preprocess = Preprocess(PreprocessSettings(color="gray"), side_px, side_px)
    settings = encoder_settings or MLPSettings(hidden=(16,), dim=6)
    encoder = ENCODERS[settings.name](settings, (1, side_px, side_px))
    model = ClusterModel(preprocess, encoder, Projection(ProjectionSettings(), 6, len(images)), KINDS)
    pixels = torch.from_numpy(images)[..., None]
    preprocess.fit_normalise(pixels)
    learner = Learner(model.eval(), pixels, LearnerOptions(0, **options))
    with torch.no_grad():
        model.centroids.copy_(kmeans(learner.all_latents(), KINDS, 0, KMeansOptions(n_init=3)).centroids)
    return learner
