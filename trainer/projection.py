"""From encoder features to the embedding that clusters are looked for in: signed square root, mean, linear map. Exported with the model.

    features (B,F) --[signed sqrt]--> (x - mean) W^T = embedding (B,D) --[L2, for centroids only]--> cluster space (B,D)

`pca` divides each direction by variance^whiten (0 none, .25 half, .5 full). `within` instead whitens the scatter INSIDE clusters:
clusters stay as far apart as they are while every direction inside them counts alike, which is what novelty needs. It is
k-means with a common covariance (Friedman and Rubin 1967; Celeux and Govaert 1992, model [lambda D A D']), found by alternating.
Measured (docs/novelty.md): full PCA whitening separates defects but mixes part types, half whitening the other way round.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from sklearn.covariance import ledoit_wolf
from torch import Tensor, nn

from configs import Settings
from trainer.clustering.kmeans import KMeansOptions, cluster_means, kmeans

WITHIN_ROUNDS = 10
TALL = 8_000  # rows from which on the covariance is taken apart instead: minutes less, and variances count down to 1e-5 only
RELATIVE_FLOOR = 1e-5  # directions below this share of the largest variance are numerical noise, and would be magnified
L2_FLOOR = 1e-12
ABSOLUTE_FLOOR = 1e-12  # all images alike: no variance at all


class ProjectionSettings(Settings):
    """`l2` serves the centroids only; novelty is measured before it (after it, its AUROC falls from .99 to .7)."""

    kind: Literal["none", "pca", "within"] = "none"
    dim: int = Field(64, ge=1)
    whiten: float = Field(0.25, ge=0, le=0.5)
    sqrt: bool = False
    l2: bool = False
    learn: bool = Field(False, description="whether a method that trains may move the linear map")


class Projection(nn.Module):
    """features (B, F) -> embedding (B, D). `kind: none` passes features through (after the optional square root).

    D is at most F and at most one less than the `n_samples` that `fit` will see: more directions than that are not there.
    """

    mean: nn.Parameter
    weight: nn.Parameter

    def __init__(self, settings: ProjectionSettings, in_dim: int, n_samples: int) -> None:
        super().__init__()
        self.settings = settings
        self.out_dim = in_dim if settings.kind == "none" else max(1, min(settings.dim, in_dim, n_samples - 1))
        if settings.kind != "none":
            self.mean = nn.Parameter(torch.zeros(in_dim), requires_grad=settings.learn)
            self.weight = nn.Parameter(torch.eye(self.out_dim, in_dim), requires_grad=settings.learn)

    def forward(self, features: Tensor) -> Tensor:
        x = _signed_sqrt(features) if self.settings.sqrt else features
        return x if self.settings.kind == "none" else (x - self.mean) @ self.weight.T

    def to_cluster_space(self, embedding: Tensor) -> Tensor:
        """(B, D) where centroids live: L2-normalised if set so."""
        if not self.settings.l2:
            return embedding
        return embedding / embedding.norm(dim=-1, keepdim=True).clamp_min(L2_FLOOR)  # as F.normalize, in fewer nodes

    @torch.no_grad()
    def fit(self, features: Tensor, n_clusters: int, seed: int) -> None:
        """Sets mean and linear map from training features (N, F); `n_clusters` serves `within`, whose clusters are found on the way."""
        settings = self.settings
        if settings.kind == "none":
            return
        x = (_signed_sqrt(features) if settings.sqrt else features).double()
        if settings.kind == "pca":
            mean, weight = principal_whitening(x, self.out_dim, settings.whiten)
        else:
            mean = x.mean(0)
            directions, variance = _principal(x - mean, self.out_dim)
            weight = _within_whitening((x - mean) @ directions.T, variance, n_clusters, seed) @ directions
        self.mean.copy_(mean)
        self.weight.copy_(weight)


def principal_whitening(x: Tensor, dim: int, whiten: float) -> tuple[Tensor, Tensor]:
    """Mean (F,) and map (d, F) of rows x (N, F), double: the first `dim` principal directions, each divided by variance^whiten."""
    mean = x.mean(0)
    directions, variance = _principal(x - mean, dim)
    return mean, directions / _floored(variance).pow(whiten)[:, None]


def _signed_sqrt(x: Tensor) -> Tensor:
    return x.sign() * x.abs().sqrt()


def _principal(centred: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The first `dim` principal directions (d, F) with fixed signs, and their variances (d,)."""
    if len(centred) > TALL:
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        directions, variance = vectors.T.flip(0)[:dim], values.flip(0)[:dim].clamp_min(0)
    else:
        _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
        directions, variance = directions[:dim], singular[:dim].square() / len(centred)
    # A singular vector's sign is arbitrary; a fixed one keeps equal seeds equal.
    signs = torch.sign(directions.gather(1, directions.abs().argmax(1, keepdim=True)))
    return directions * signs, variance


def _floored(variance: Tensor) -> Tensor:
    return variance.clamp_min(max(RELATIVE_FLOOR * float(variance.max()), ABSOLUTE_FLOOR))


def _within_whitening(z: Tensor, variance: Tensor, n_clusters: int, seed: int) -> Tensor:
    """(d, d) map that whitens the pooled scatter inside clusters of z (N, d); starts from half-whitened k-means."""
    weight = torch.diag(_floored(variance).pow(-0.25))
    labels = None
    for _ in range(WITHIN_ROUNDS):
        result = kmeans(z @ weight.T, n_clusters, seed, KMeansOptions(n_init=10))
        if labels is not None and torch.equal(result.labels, labels):
            break
        labels = result.labels
        residual = (z - cluster_means(z, labels, n_clusters)[labels]) @ weight.T
        # Shrunk (Ledoit and Wolf 2004) towards the last round's scatter: directions with too few samples must not blow up.
        covariance = torch.from_numpy(ledoit_wolf(residual.cpu().numpy(), assume_centered=True)[0]).to(z)
        values, vectors = torch.linalg.eigh(covariance)
        weight = (vectors.T / _floored(values).sqrt()[:, None]) @ weight
    return weight
