"""Distances of cells to the nearest of learned centres: the clusters' own operation, one level down.

With `local` a distance counts in radii of its own centre, so that a rare kind of good part is as near to its own as a common one. With
several neighbours and centres that are points this is the local outlier factor without its reachability floor (Breunig et al. 2000).
Centres that are points: Roth et al. 2022 (PatchCore, arXiv 2106.08265).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.bank.coreset import greedy_coreset
from trainer.bank.settings import BankSettings
from trainer.clustering.kmeans import KMeansOptions, distinct_rows, kmeans
from trainer.clustering.stochastic_quantization import StochasticQuantizer
from trainer.distance import DIRECT_LIMIT, nearest, squared_distances
from trainer.errors import DataError

RADIUS_FLOOR = 0.1  # of the typical one: copies of one picture have a radius of 0
POINT_NEIGHBOURS = 5  # over how many others a point's radius is taken, where it is not `neighbours`
ELSEWHERE = 1e6  # added to squared distances to centres of other clusters
FEW_CENTRES = 8  # of the smallest cluster
NEAREST = 0.05  # the smallest distance between a cell of a grid and a centre, where cells have a deviation of about 1 in each direction


class Centres(nn.Module):
    """`centres` (M, d), `radius` (M,), `cluster` (M,), empty unless `per_cluster`. Before `fit`, M is `settings.size`."""

    centres: Tensor
    radius: Tensor
    cluster: Tensor

    def __init__(self, settings: BankSettings, dim: int) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("centres", torch.zeros(settings.size, dim))
        self.register_buffer("radius", torch.ones(settings.size))
        self.register_buffer("cluster", torch.zeros(0, dtype=torch.int64))

    def forward(self, cells: Tensor, cluster_id: Tensor) -> Tensor:
        """(B, h, w): mean distance of cells (B, d, h, w) to their nearest centres."""
        d2 = self._squared(cells)  # (B, M, h, w)
        if len(self.cluster):
            d2 = d2 + ELSEWHERE * (self.cluster != cluster_id[:, None])[:, :, None, None].to(d2.dtype)
        if self.settings.neighbours == 1:
            scaled = d2 / self.radius.square()[:, None, None] if self.settings.local else d2
            return scaled.amin(1).sqrt()
        near, which = d2.topk(min(self.settings.neighbours, len(self.centres)), dim=1, largest=False)
        found = near.sqrt().mean(1)
        return found / self.radius[which].mean(1) if self.settings.local else found

    @torch.no_grad()
    def fit(self, z: Tensor, groups: Tensor, clusters: Tensor, seed: int) -> None:
        """Learns from cells z (n, d), whose images are of `groups` (n,) and lie in `clusters` (n,).

        Raises:
            DataError: no centre is known from enough groups.
        """
        if not self.settings.per_cluster:
            self.centres, self.radius = _learned(self.settings, z, groups, seed)
            return
        found = []
        for k in clusters.unique().tolist():
            own = clusters == k
            share = max(FEW_CENTRES, round(self.settings.size * float(own.float().mean())))
            settings = self.settings.model_copy(update={"size": share})
            centres, radius = _learned(settings, z[own], groups[own], seed)
            # Fewer than the neighbours asked for are taken again: another cluster's would count, each with the root of ELSEWHERE.
            again = torch.arange(max(len(centres), settings.neighbours), device=z.device) % len(centres)
            found.append((centres[again], radius[again], torch.full((len(again),), k, device=z.device)))
        self.centres, self.radius, self.cluster = (torch.cat(part) for part in zip(*found, strict=True))

    def _squared(self, cells: Tensor) -> Tensor:
        if cells.shape[2:] == (1, 1) and self.centres.numel() <= DIRECT_LIMIT:
            return squared_distances(cells.flatten(1), self.centres)[:, :, None, None]
        # As a 1x1 convolution: |x|^2 - 2 x c + |c|^2. Cells are centred and of unit scale, so the terms are small, but what they leave of
        # a cell on a point of the bank is rounding, whose root is another one in every runtime.
        products = nn.functional.conv2d(cells, -2 * self.centres[:, :, None, None], self.centres.square().sum(1))
        return (products + cells.square().sum(1, keepdim=True)).clamp_min(NEAREST**2)


def _learned(settings: BankSettings, z: Tensor, groups: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Centres (M, d) and their radii (M,)."""
    size = distinct_rows(z[: 4 * settings.size], settings.size)
    size = min(settings.size, size if size >= settings.size else distinct_rows(z, settings.size))
    are_points = settings.learn in {"coreset", "sample"} or size >= len(z)
    if settings.learn == "sample":
        # At random, so that points lie as densely as parts do: a coreset thins out what is common, and radii would say so.
        centres = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))[: settings.size].to(z.device)]
    elif are_points:
        centres = z[greedy_coreset(z, size, seed)]
    elif settings.learn == "kmeans":
        centres = kmeans(z, size, seed, KMeansOptions(n_init=1, max_iterations=30)).centroids
    else:
        centres = StochasticQuantizer(size, seed).fit(z).centroids
    ids, d2 = nearest(z, centres)
    keep = _groups_of(ids, groups, len(centres)) >= settings.min_groups
    if not keep.any():
        raise DataError(
            f"novelty.bank.min_groups is {settings.min_groups}, but no centre is known from so many groups; lower it, or size"
        )
    radius = _point_radii(settings, centres) if are_points else _member_radii(ids, d2, len(centres))
    return centres[keep].float(), radius[keep].float()


def _groups_of(ids: Tensor, groups: Tensor, count: int) -> Tensor:
    """Number of groups (M,) among the cells nearest to each centre."""
    pairs = torch.unique(torch.stack([ids, groups], 1), dim=0)
    return torch.bincount(pairs[:, 0], minlength=count)


def _member_radii(ids: Tensor, d2: Tensor, count: int) -> Tensor:
    """Root mean square distance of the members."""
    sums = torch.zeros(count).to(d2).index_add_(0, ids, d2)
    own = (sums / torch.bincount(ids, minlength=count).clamp_min(1)).sqrt()
    return own.clamp_min(max(RADIUS_FLOOR * float(d2.mean().sqrt()), 1e-6))


def _point_radii(settings: BankSettings, points: Tensor) -> Tensor:
    """Mean distance of each point to the nearest others."""
    k = min(settings.neighbours if settings.neighbours > 1 else POINT_NEIGHBOURS, len(points) - 1)
    if k < 1:
        return torch.ones(len(points)).to(points)
    parts = [
        torch.cdist(part, points).topk(k + 1, dim=1, largest=False).values[:, 1:].mean(1) for part in points.split(256)
    ]
    found = torch.cat(parts)
    return found.clamp_min(max(RADIUS_FLOOR * float(found.median()), 1e-6))
