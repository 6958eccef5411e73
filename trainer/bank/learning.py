"""Learns a bank from good parts: a sample of their cells for the linear map and the centres, all of them for Gaussians. No label is looked at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.bank.bank import Bank
from trainer.bank.centres import Centres
from trainer.bank.gaussians import Gaussians, Moments
from trainer.bank.settings import BankSettings
from trainer.clustering.kmeans import distinct_rows
from trainer.errors import DataError
from trainer.model import ClusterModel, evaluating
from trainer.stored_pixels import Pixels, select

SAMPLED_CELLS = 20_000
BATCH = 16  # images at once: below 32 MB for a map of distances, allocators keep their memory


@dataclass(frozen=True)
class Material:
    """Good parts: pixels (N, h, w, C) as after `preprocess.geometry`, their groups (N,) and cluster ids (N,)."""

    pixels: Pixels
    groups: NDArray[np.int64]
    clusters: Tensor
    seed: int

    def take(self, index: NDArray[np.int64]) -> Material:
        """Some of the parts."""
        rows = torch.from_numpy(index)
        clusters = self.clusters[rows.to(self.clusters.device)]
        return replace(self, pixels=select(self.pixels, rows), groups=self.groups[index], clusters=clusters)


def learn_bank(settings: BankSettings, model: ClusterModel, material: Material) -> Bank:
    """A bank whose `patch_radius` is still 1.

    Raises:
        DataError: the encoder has no such layers, the stride leaves no cell, or the good parts are all alike.
    """
    (bank,) = learn_banks([settings], model, material)
    return bank


@torch.no_grad()
def learn_banks(wanted: Sequence[BankSettings], model: ClusterModel, material: Material) -> list[Bank]:
    """Several banks of the same good parts in one or two passes of the encoder; each as `learn_bank` gives it alone."""
    layers = union_of(wanted)
    model.encoder.check_layers(layers)
    maps = next(maps_of(layers, model, material.pixels[:1]))
    banks = [_begun(settings, maps, len(material.pixels)) for settings in wanted]
    for bank, (rows, image) in zip(banks, sample_cells(banks, model, material), strict=True):
        _fit_cells(bank, rows, image, material)
    gaussians = [(bank.cells, bank.ordinary, Moments()) for bank in banks if isinstance(bank.ordinary, Gaussians)]
    if gaussians:
        for maps in maps_of(layers, model, material.pixels):
            for cells, _, moments in gaussians:
                moments.add(cells(maps))
        for _, ordinary, moments in gaussians:
            ordinary.fit(moments)
    return [bank.eval() for bank in banks]


def empty_bank(settings: BankSettings, maps: Mapping[str, Tensor]) -> Bank:
    """One that has learned nothing yet, for an encoder with these maps (1, C, h, w) of one image."""
    return Bank(settings, [maps[layer].shape[1] for layer in settings.layers]).to(maps[settings.layers[0]].device)


def _begun(settings: BankSettings, maps: Mapping[str, Tensor], count: int) -> Bank:
    """An empty bank for `count` parts; there are no more directions than cells to find them in."""
    bank = empty_bank(settings, maps)
    _, _, height, width = bank.cells(maps).shape
    n_cells = count * height * width
    if n_cells == 0:
        layers = settings.layers
        grids = ", ".join(f"{maps[layer].shape[2]}x{maps[layer].shape[3]}" for layer in layers)
        raise DataError(
            f"novelty.bank.stride is {settings.stride}, but the maps of {', '.join(layers)} have {grids} cells, "
            f"expected a stride that leaves one; stride 1 leaves all"
        )
    if bank.cells.out_dim < n_cells:
        return bank
    return empty_bank(settings.model_copy(update={"dim": max(1, n_cells - 1)}), maps)


def _fit_cells(bank: Bank, rows: Tensor, image: Tensor, material: Material) -> None:
    """The linear map, and the centres where there are some."""
    # Copies of one image are alike too, though its cells are not.
    if distinct_rows(rows, 2) < 2 or _are_copies(material.pixels):
        raise DataError(
            f"novelty.bank finds nothing to learn: all {len(material.pixels)} good parts look alike to its layers "
            f"{', '.join(bank.settings.layers)}; record different parts, or leave novelty.bank out"
        )
    bank.cells.fit(rows, bank.settings.whiten)
    if isinstance(bank.ordinary, Centres):
        groups = torch.from_numpy(np.unique(material.groups, return_inverse=True)[1])
        z = bank.cells.project(rows)
        bank.ordinary.fit(z, groups[image].to(z.device), material.clusters.cpu()[image].to(z.device), material.seed)


def _are_copies(pixels: Pixels) -> bool:
    """Whether all images are the same; it stops at the first that is not."""
    return all(bool((part == pixels[:1]).all()) for part in pixels.split(BATCH))


def union_of(wanted: Iterable[BankSettings]) -> tuple[str, ...]:
    """The layers of all of them, each once."""
    return tuple(dict.fromkeys(layer for settings in wanted for layer in settings.layers))


@torch.no_grad()
def maps_of(layers: Sequence[str], model: ClusterModel, pixels: Pixels) -> Iterator[dict[str, Tensor]]:
    """The maps of these layers, batch by batch, in eval mode."""
    with evaluating(model):
        for part in pixels.split(BATCH):
            x = model.input_of(part.to(model.centroids.device))
            yield model.encoder.with_maps(x, layers)[1]


@torch.no_grad()
def sample_cells(banks: Sequence[Bank], model: ClusterModel, material: Material) -> list[tuple[Tensor, Tensor]]:
    """Of each bank: rows (n, F) before the linear map and the image that each is of (n,).

    SAMPLED_CELLS, the same number of each image, at random places; all cells where there are fewer. Of more images than that so many are
    drawn, and one cell of each.
    """
    images, pixels = torch.arange(len(material.pixels)), material.pixels
    if len(images) > SAMPLED_CELLS:
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(material.seed))
        images = drawn[:SAMPLED_CELLS].sort().values
        pixels = select(pixels, images)
    each = max(1, -(-SAMPLED_CELLS // len(images)))
    generators = [torch.Generator().manual_seed(material.seed) for _ in banks]
    rows: list[list[Tensor]] = [[] for _ in banks]
    for maps in maps_of(union_of(bank.settings for bank in banks), model, pixels):
        for bank, generator, found in zip(banks, generators, rows, strict=True):
            cells = bank.cells.gather(maps).flatten(2).transpose(1, 2)  # (B, h w, F)
            count = min(each, cells.shape[1])
            # Drawn on the processor: the same on every device.
            drawn = torch.stack([torch.randperm(cells.shape[1], generator=generator)[:count] for _ in cells])
            drawn = drawn.to(cells.device)[..., None].expand(-1, -1, cells.shape[2])
            found.append(cells.gather(1, drawn).flatten(0, 1).float())
    samples = [torch.cat(found) for found in rows]
    return [(sample, images.repeat_interleave(len(sample) // len(images))) for sample in samples]
