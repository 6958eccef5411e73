"""The trained model as one module: pre-processing, encoder, projection, centroids, novelty. What `fit` returns and the exporter fuses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer import novelty, ranks
from trainer.bank.bank import Bank
from trainer.distance import nearest
from trainer.encoders.base import Encoder
from trainer.preprocess import Preprocess
from trainer.projection import Projection
from trainer.stored_pixels import Pixels, select

PREDICT_BATCH = 256
BANK_BATCH = 16  # images whose distances to all centres of a bank are held at once


@dataclass(frozen=True)
class Seen:
    """What the model makes of N images: embeddings `z` (N, D) before any L2 and, with a bank, `patch_score` (N,)."""

    z: Tensor
    patch_score: Tensor | None = None

    def take(self, index: Tensor) -> Seen:
        """Of some of the images."""
        return Seen(self.z[index], None if self.patch_score is None else self.patch_score[index])


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode; afterwards as it was."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


class ClusterModel(nn.Module):
    """K clusters in a D-dimensional embedding.

    `centroids` (K, D) live in cluster space (after the optional L2), `cluster_mean` (K, D) before it. `cluster_radius` (K,),
    `novelty_scale` (1,), `calibration` and `calibration_weight` (M,) are set by novelty.calibrate. `bank`: where novelty looks at patches too.
    """

    centroids: nn.Parameter
    cluster_mean: Tensor
    cluster_radius: Tensor
    novelty_scale: Tensor
    calibration: Tensor
    calibration_weight: Tensor

    def __init__(self, preprocess: Preprocess, encoder: Encoder, projection: Projection, n_clusters: int) -> None:
        super().__init__()
        self.preprocess, self.encoder, self.projection = preprocess, encoder, projection
        self.centroids = nn.Parameter(torch.zeros(n_clusters, projection.out_dim))
        self.register_buffer("cluster_mean", torch.zeros(n_clusters, projection.out_dim))
        self.register_buffer("cluster_radius", torch.ones(n_clusters))
        self.register_buffer("novelty_scale", torch.ones(1))
        self.register_buffer("calibration", torch.zeros(1))
        self.register_buffer("calibration_weight", torch.ones(1))
        self.bank: Bank | None = None

    @property
    def n_clusters(self) -> int:
        """K."""
        return self.centroids.shape[0]

    @torch.no_grad()
    def set_centroids(self, mu: Tensor) -> None:
        """Takes centroids mu (K, D); another K than before is that of a method which finds it, and empties means and radii."""
        if len(mu) == self.n_clusters:
            self.centroids.copy_(mu)
            return
        self.centroids = nn.Parameter(mu.detach().to(self.centroids).clone())
        self.cluster_mean = torch.zeros_like(self.centroids.data)
        self.cluster_radius = torch.ones(len(mu)).to(self.centroids)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embedding (B, D) of pixels (B, h, w, 3 or 1) that went through `preprocess.geometry`."""
        return self.projection(self.encoder(self.input_of(pixels)))

    def input_of(self, pixels: Tensor) -> Tensor:
        """The encoder's input (B, C, h, w), with the channels last in memory: grey pictures given three times are not, and take half as long again."""
        return self.preprocess.normalise(pixels).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def embed_dataset(self, pixels: Pixels, batch: int = PREDICT_BATCH) -> Tensor:
        """Embeddings (N, D) of a data set's pixels, in eval mode, on the model's device."""
        return self.over_ranks(pixels, batch, lambda part: [self.embed_pixels(part)])[0]

    @torch.no_grad()
    def see(self, pixels: Pixels, batch: int = PREDICT_BATCH) -> Seen:
        """What novelty is judged by, of a data set's pixels that went through `preprocess.geometry`; in eval mode, on the model's device."""
        if self.bank is None:
            return Seen(self.embed_dataset(pixels, batch))
        return Seen(*self.over_ranks(pixels, min(batch, BANK_BATCH), self._embed_and_score))

    def _embed_and_score(self, part: Tensor) -> list[Tensor]:
        if self.bank is None:
            raise ValueError("this model has no bank")
        features, maps = self.encoder.with_maps(self.input_of(part), self.bank.settings.layers)
        z = self.projection(features)
        return [z, self.bank(maps, self.assign(z)[0])[0]]

    def over_ranks(self, pixels: Pixels, batch: int, rows: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """What `rows` gives for batches of pixels (N, ...), in eval mode, joined; each process sees its part of them."""
        together, n = ranks.current(), len(pixels)
        with evaluating(self):
            own = select(pixels, together.part(n)).split(batch)
            found = [rows(some.to(self.centroids.device)) for some in own]
        return [together.join(torch.cat(column), n) for column in zip(*found, strict=True)]

    @torch.no_grad()
    def novelty_map(self, pixels: Tensor) -> Tensor:
        """novelty_map (B, h, w) of a few images' pixels; a model without a bank has none."""
        if self.bank is None:
            raise ValueError("this model has no bank, so no novelty_map; set novelty.bank")
        with evaluating(self):
            x = self.input_of(pixels.to(self.centroids.device))
            features, maps = self.encoder.with_maps(x, self.bank.settings.layers)
            return self.bank(maps, self.assign(self.projection(features))[0])[1]

    @torch.no_grad()
    def embed_frozen(self, features: Tensor) -> Tensor:
        """Embeddings (N, D) from the outputs (N, F) of the encoder's frozen part, in eval mode."""
        with evaluating(self):
            parts = (self.encoder.stem(part) for part in features.split(PREDICT_BATCH))
            return torch.cat([self.projection(self.encoder.head(part)) for part in parts])

    @torch.no_grad()
    def assign(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Cluster id (N,) and distance (N,) to its centroid for embeddings z (N, D)."""
        ids, d2 = nearest(self.projection.to_cluster_space(z), self.centroids)
        return ids, d2.sqrt()

    @torch.no_grad()
    def raw_scores(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Raw scores s (N,) and cluster ids (N,)."""
        ids, _ = self.assign(seen.z)
        distance = novelty.novelty_distance(seen.z, self.cluster_mean, ids)
        return novelty.raw_score(distance, self.cluster_radius, ids, seen.patch_score), ids

    @torch.no_grad()
    def novelty_scores(self, seen: Seen) -> Tensor:
        """novelty_score (N,); 1.0 is the edge at the target rate."""
        return self.raw_scores(seen)[0] / self.novelty_scale

    def transform(self, images: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Embeddings (N, D) of images (H, W, 3) uint8 BGR of any size (also one array (N, H, W, 3))."""
        rows = [self._geometry(image) for image in images]
        if not rows:
            return np.zeros((0, self.projection.out_dim), np.float32)
        return self.embed_dataset(torch.cat(rows)).cpu().numpy()

    def predict(self, images: Iterable[NDArray[np.uint8]]) -> NDArray[np.int64]:
        """Cluster ids (N,) of images (H, W, 3) uint8 BGR: the nearest centroid, whatever the method was."""
        z = torch.from_numpy(self.transform(images)).to(self.centroids.device)
        return self.assign(z)[0].cpu().numpy() if len(z) else np.zeros(0, np.int64)

    def _geometry(self, image: NDArray[np.uint8]) -> Tensor:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in {1, 3}:
            raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 (H, W, 3) BGR")
        return self.preprocess.geometry(torch.from_numpy(np.ascontiguousarray(image))[None])
