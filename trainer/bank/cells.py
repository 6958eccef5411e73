"""From an encoder's feature maps to cells of short vectors: what a bank's centres are compared with.

    patches:  maps (B,C_l,h_l,w_l) --[W_l x]--[mean of 3x3]--[to the finest grid]--> sum over l, + bias = cells (B,d,h,w)
    image:    mean and deviation of each map over the image, roots of each of length 1 (B,2C_l,1,1) --[W x + bias]--> cells (B,d,1,1)

W is a PCA with a whitening exponent of the concatenated maps, each brought to one scale first. For patches each layer is projected on its
own grid, which gives the same numbers as concatenating first (every step is linear) for a fraction of the operations.
Roots of length 1 are the Hellinger map (Arandjelovic and Zisserman 2012, "Three things ..."): parts differ most in the strength of
their texture, and without it a smooth unknown kind is nearer to the bank than a rough known part (measured: docs/novelty.md).
Local pooling after Roth et al. 2022 (PatchCore, arXiv 2106.08265, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer.bank.settings import BankSettings
from trainer.projection import principal_whitening

DEVIATION_FLOOR = 1e-6  # a constant map has variance 0


class Cells(nn.Module):
    """Maps of `settings.layers`, whose channels are `widths`, -> cells (B, d, h, w); (B, d, 1, 1) with `cells: image`."""

    bias: nn.Parameter

    def __init__(self, settings: BankSettings, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers, self.is_image, self.stride = settings.layers, settings.cells == "image", settings.stride
        self.is_unit = settings.unit
        self.widths = [width * (2 if self.is_image else 1) for width in widths]
        self.out_dim = min(settings.dim, sum(self.widths))
        self.weights = nn.ParameterList(torch.zeros(self.out_dim, width, 1, 1) for width in self.widths)
        self.bias = nn.Parameter(torch.zeros(self.out_dim, 1, 1))
        self.requires_grad_(False)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        grid = self._grid(maps)
        total: Tensor = self.bias
        for layer, weight in zip(self.layers, self.weights, strict=True):
            if self.is_image:
                total = total + nn.functional.conv2d(self._moments(maps[layer]), weight)
            else:
                total = total + to_grid(local_mean(nn.functional.conv2d(maps[layer], weight)), grid)
        return self._thinned(total)

    def gather(self, maps: Mapping[str, Tensor]) -> Tensor:
        """(B, F, h, w), before the linear map: what that is fitted on."""
        if self.is_image:
            return torch.cat([self._moments(maps[layer]) for layer in self.layers], 1)
        grid = self._grid(maps)
        return self._thinned(torch.cat([to_grid(local_mean(maps[layer]), grid) for layer in self.layers], 1))

    def _thinned(self, cells: Tensor) -> Tensor:
        """Every `stride`-th cell, from the middle of the first ones."""
        if self.stride == 1 or self.is_image:
            return cells
        first = (self.stride - 1) // 2 if self.stride % 2 else self.stride // 2
        return cells[:, :, first :: self.stride, first :: self.stride]

    def project(self, rows: Tensor) -> Tensor:
        """(n, d): the linear map of rows (n, F) of `gather`."""
        return rows @ torch.cat([weight.flatten(1) for weight in self.weights], 1).T + self.bias.flatten()

    @torch.no_grad()
    def fit(self, rows: Tensor, whiten: float) -> None:
        """Sets the linear map from sampled rows (n, F) of `gather`."""
        # A map counts by its width and not by how loud it is. Those of an image are of length 1 already, or their strength is wanted.
        parts = rows.double().split([sum(self.widths)] if self.is_image else self.widths, 1)
        gain = torch.cat([_gain(part).expand(part.shape[1]) for part in parts])
        mean, weight = principal_whitening(rows.double() * gain, self.out_dim, whiten)
        scaled = weight * gain
        self.bias.copy_(-(weight @ mean)[:, None, None])
        for own, piece in zip(self.weights, scaled.split(self.widths, 1), strict=True):
            own.copy_(piece[:, :, None, None])

    def _moments(self, x: Tensor) -> Tensor:
        """Mean and deviation (B, 2C, 1, 1) of a map."""
        mean = x.mean((2, 3), keepdim=True)
        deviation = (x - mean).square().mean((2, 3), keepdim=True).clamp_min(DEVIATION_FLOOR).sqrt()
        return torch.cat([_unit(mean), _unit(deviation)] if self.is_unit else [mean, deviation], 1)

    def _grid(self, maps: Mapping[str, Tensor]) -> tuple[int, int]:
        height, width = max(((m.shape[2], m.shape[3]) for m in (maps[layer] for layer in self.layers)), key=_area)
        return height, width


def local_mean(x: Tensor) -> Tensor:
    """Mean of 3x3 cells of (B, C, h, w); at the border, of those that are there."""
    return nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def to_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, C, *grid), linear."""
    if (x.shape[2], x.shape[3]) == grid:
        return x
    return nn.functional.interpolate(x, size=grid, mode="bilinear", align_corners=False)


def _unit(x: Tensor) -> Tensor:
    rooted = x.sign() * x.abs().sqrt()
    return rooted / rooted.norm(dim=1, keepdim=True).clamp_min(DEVIATION_FLOOR)


def _gain(part: Tensor) -> Tensor:
    return 1 / part.var(0, unbiased=False).mean().clamp_min(1e-12).sqrt()


def _area(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]
