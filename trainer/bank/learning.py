"""Learns a bank from good parts: a sample of their cells for the linear map and the centres, all of them for Gaussians. No label is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.bank.bank import Bank
from trainer.bank.centres import Centres
from trainer.bank.settings import BankSettings
from trainer.clustering.kmeans import distinct_rows
from trainer.errors import DataError
from trainer.model import ClusterModel, evaluating

SAMPLED_CELLS = 30_000
BATCH = 16  # images at once: below 32 MB for a map of distances, allocators keep their memory


@dataclass(frozen=True)
class Material:
    """Good parts: pixels (N, h, w, C) as after `preprocess.geometry`, their groups (N,) and cluster ids (N,)."""

    pixels: Tensor
    groups: NDArray[np.int64]
    clusters: Tensor
    seed: int

    def take(self, index: NDArray[np.int64]) -> Material:
        """Some of the parts."""
        rows = torch.from_numpy(index)
        clusters = self.clusters[rows.to(self.clusters.device)]
        return replace(self, pixels=self.pixels[rows], groups=self.groups[index], clusters=clusters)


def learn_bank(settings: BankSettings, model: ClusterModel, material: Material) -> Bank:
    """A bank whose `patch_radius` is still 1.

    Raises:
        DataError: the encoder has no such layers, the stride leaves no cell, or the good parts are all alike.
    """
    model.encoder.check_layers(settings.layers)
    if settings.cells == "image":  # more directions than parts are not there
        settings = settings.model_copy(update={"dim": max(1, min(settings.dim, len(material.pixels) - 1))})
    maps = next(maps_of(settings, model, material.pixels[:1]))
    bank = Bank(settings, [maps[layer].shape[1] for layer in settings.layers]).to(model.centroids.device)
    if 0 in bank.cells(maps).shape:
        grids = ", ".join(f"{maps[layer].shape[2]}x{maps[layer].shape[3]}" for layer in settings.layers)
        raise DataError(
            f"novelty.bank.stride is {settings.stride}, but the maps of {', '.join(settings.layers)} have {grids} cells, "
            f"expected a stride that leaves one; stride 1 leaves all"
        )
    rows, image = sample_cells(bank, model, material)
    # Copies of one image are alike too, though its cells are not.
    if distinct_rows(rows, 2) < 2 or bool((material.pixels == material.pixels[:1]).all()):
        raise DataError(
            f"novelty.bank finds nothing to learn: all {len(material.pixels)} good parts look alike to its layers "
            f"{', '.join(settings.layers)}; record different parts, or leave novelty.bank out"
        )
    bank.cells.fit(rows, settings.whiten)
    if isinstance(bank.ordinary, Centres):
        groups = torch.from_numpy(np.unique(material.groups, return_inverse=True)[1])
        z = bank.cells.project(rows)
        bank.ordinary.fit(z, groups[image].to(z.device), material.clusters.cpu()[image].to(z.device), material.seed)
    else:
        bank.ordinary.fit(bank.cells(maps) for maps in maps_of(settings, model, material.pixels))
    return bank.eval()


@torch.no_grad()
def maps_of(settings: BankSettings, model: ClusterModel, pixels: Tensor) -> Iterator[dict[str, Tensor]]:
    """The maps of the settings' layers, batch by batch, in eval mode."""
    with evaluating(model):
        for part in pixels.split(BATCH):
            x = model.preprocess.normalise(part.to(model.centroids.device))
            yield model.encoder.with_maps(x, settings.layers)[1]


@torch.no_grad()
def sample_cells(bank: Bank, model: ClusterModel, material: Material) -> tuple[Tensor, Tensor]:
    """Rows (n, F) before the linear map and the image that each is of (n,): SAMPLED_CELLS, the same number of each image, at random places."""
    each = max(1, -(-SAMPLED_CELLS // len(material.pixels)))
    generator = torch.Generator().manual_seed(material.seed)
    rows, count = [], 0
    for maps in maps_of(bank.settings, model, material.pixels):
        cells = bank.cells.gather(maps).flatten(2).transpose(1, 2)  # (B, h w, F)
        count = min(each, cells.shape[1])
        # Drawn on the processor: the same on every device.
        drawn = torch.stack([torch.randperm(cells.shape[1], generator=generator)[:count] for _ in cells])
        rows.append(cells.gather(1, drawn.to(cells.device)[..., None].expand(-1, -1, cells.shape[2])).flatten(0, 1))
    return torch.cat(rows).float(), torch.arange(len(material.pixels)).repeat_interleave(count)
