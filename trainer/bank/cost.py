"""What a bank adds to the encoder in multiply-adds, which is the same on every machine; `novelty.bank.max_cost` bounds it.

Milliseconds follow roughly, since minima over many centres wait for memory: `edge-dkm bench` measures those.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.bank.bank import Bank
from trainer.bank.centres import Centres
from trainer.errors import DataError
from trainer.model import ClusterModel, evaluating


@torch.no_grad()
def encoder_operations(model: ClusterModel, pixels: Tensor) -> int:
    """Multiply-adds of convolutions and linear layers of the encoder for one image; `pixels` (1, h, w, C)."""
    counted = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal counted
        weight = module.weight
        if isinstance(weight, Tensor):
            places = output[0].numel() // weight.shape[0]
            counted += places * weight.numel()

    layers = [m for m in model.encoder.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with evaluating(model):
            model.encoder(model.input_of(pixels.to(model.centroids.device)))
    finally:
        for handle in handles:
            handle.remove()
    return counted


def bank_operations(bank: Bank, maps: Mapping[str, Tensor]) -> int:
    """Multiply-adds of a bank for one image with these maps (1, C, h, w)."""
    cells, settings = bank.cells, bank.settings
    grid = cells(maps)
    places = grid.shape[2] * grid.shape[3]
    counted = 0
    for layer, width in zip(settings.layers, cells.widths, strict=True):
        counted += width * cells.out_dim * (1 if cells.is_image else maps[layer].shape[2] * maps[layer].shape[3])
    if isinstance(bank.ordinary, Centres):
        return counted + places * cells.out_dim * len(bank.ordinary.centres)
    return counted + places * cells.out_dim**2


@torch.no_grad()
def cost_of(bank: Bank, model: ClusterModel, pixels: Tensor) -> float:
    """The bank's multiply-adds as a share of the encoder's, for one image `pixels` (1, h, w, C)."""
    with evaluating(model):
        x = model.input_of(pixels.to(model.centroids.device))
        maps = model.encoder.with_maps(x, bank.settings.layers)[1]
    return bank_operations(bank, maps) / max(1, encoder_operations(model, pixels))


def check_cost(bank: Bank, model: ClusterModel, pixels: Tensor) -> float:
    """The cost, where it is within `max_cost`.

    Raises:
        DataError: it is not; the text says which size would fit.
    """
    cost, settings = cost_of(bank, model, pixels), bank.settings
    if cost <= settings.max_cost:
        return cost
    least = Bank(settings.model_copy(update={"size": 1}), _widths(bank)).to(model.centroids.device)
    fixed = cost_of(least, model, pixels)
    count = len(bank.ordinary.centres) if isinstance(bank.ordinary, Centres) else 1
    per_centre = (cost - fixed) / max(1, count - 1)
    fits = int((settings.max_cost - fixed) / per_centre) if per_centre > 0 else 0
    way = (
        f"size {fits} would fit"
        if fits >= 8 and settings.learn != "gaussian"
        else "a smaller dim, fewer layers or stride 2 would be less"
    )
    raise DataError(
        f"novelty.bank costs {cost:.0%} of the encoder's multiply-adds, max_cost allows {settings.max_cost:.0%}; {way}, or raise max_cost"
    )


def _widths(bank: Bank) -> list[int]:
    return [width // 2 if bank.cells.is_image else width for width in bank.cells.widths]
