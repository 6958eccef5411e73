"""Chooses the images that will prove an exported graph: clear members of every cluster, kept as PNG in the run folder.

So a run can be exported where the training images are not. Written by fit, read by the exporter.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from trainer.distance import squared_distances_matmul
from trainer.errors import ArtifactError
from trainer.items import BadImageError, Item, decode
from trainer.model import ClusterModel

MAX_IMAGES = 24


def choose(model: ClusterModel, z: NDArray[np.float32]) -> list[int]:
    """Indices of images with the widest margin between their two nearest centroids, the same number from each cluster; z is (N, D)."""
    mu = model.centroids.detach().cpu()
    latents = model.projection.to_cluster_space(torch.from_numpy(z))
    distances = squared_distances_matmul(latents, mu, mu.mean(0)).sqrt()
    nearest = distances.argmin(1)
    if model.n_clusters == 1:
        return np.linspace(0, len(z) - 1, min(MAX_IMAGES, len(z))).astype(int).tolist()
    two = distances.topk(2, largest=False).values
    margin = (two[:, 1] - two[:, 0]) / two[:, 0].clamp_min(1.0)
    each = max(1, MAX_IMAGES // model.n_clusters)
    chosen: list[int] = []
    for k in range(model.n_clusters):
        members = torch.nonzero(nearest == k)[:, 0]
        chosen += members[margin[members].argsort(descending=True)[:each]].tolist()
    return chosen[: max(MAX_IMAGES, model.n_clusters)]


def save_images(items: list[Item], folder: Path) -> None:
    """Writes the items' original pixels as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for n, item in enumerate(items):
        try:
            ok, data = cv2.imencode(".png", item.read()[0])
        except BadImageError:
            continue
        if ok:
            (folder / f"{n:03d}.png").write_bytes(data.tobytes())


def load_images(folder: Path) -> list[NDArray[np.uint8]]:
    """The saved images, (H, W, 3) uint8 BGR each."""
    images = []
    for path in sorted(folder.glob("*.png")):
        try:
            images.append(decode(path.read_bytes()))
        except BadImageError as error:
            raise ArtifactError(f"golden image {path} {error}; delete it, the others serve") from None
    return [np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image for image in images]
