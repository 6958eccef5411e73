"""Random changes of training batches that do not change what a part is; `augment:` in YAML, for every method alike.

Source: Guo, Zhu, Liu, Yin, "Deep Embedded Clustering with Data Augmentation" (DEC-DA), ACML 2018: shifts of 10 % and turns of 10
degrees; encoder and decoder learn from changed images, target distributions, labels and centroids come from the clean ones. Differs from the paper: what
comes into view repeats the border instead of black, since a factory background is seldom black.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from configs import Settings
from trainer import ranks


class AugmentSettings(Settings):
    """All draws but of `noise` are uniform in [-value, value], one per image. Choose only changes that a part may show without being another part."""

    shift: float = Field(0.0, ge=0, lt=1, description="share of the side")
    rotate_deg: float = Field(0.0, ge=0, le=180)
    scale: float = Field(0.0, ge=0, lt=1, description="relative change of size")
    flip: Literal["none", "horizontal", "vertical", "both"] = "none"
    brightness: float = Field(0.0, ge=0, description="added, in standard deviations of the input")
    contrast: float = Field(0.0, ge=0, lt=1, description="relative change")
    noise: float = Field(0.0, ge=0, description="standard deviation of Gaussian noise, in units of the input")

    @property
    def is_identity(self) -> bool:
        """Whether nothing is changed."""
        return self == AugmentSettings()

    @property
    def moves(self) -> bool:
        """Whether pixels change place."""
        return bool(self.shift or self.rotate_deg or self.scale or self.flip != "none")


def augment(
    x: Tensor, settings: AugmentSettings, positions: Tensor | slice = slice(None), n: int | None = None
) -> Tensor:
    """Changes inputs (B, C, H, W) on their device; the draws come from torch's global generator, which the loop seeds per step.

    Args:
        positions, n: where x lies in a batch of n that several processes share: all draw for the whole batch, each takes its own.
    """
    draws = _Draws(len(x) if n is None else n, positions, x.device)
    if settings.moves:
        maps = _affine(x, settings, draws)
        if len(x):  # a share may be empty, which affine_grid refuses
            grid = nn.functional.affine_grid(maps, list(x.shape), align_corners=False)
            x = nn.functional.grid_sample(x, grid, "bilinear", "border", align_corners=False)
    if settings.contrast:
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (x - mean) * (1 + settings.contrast * draws.uniform(1, 1, 1))
    if settings.brightness:
        x = x + settings.brightness * _deviation(x) * draws.uniform(1, 1, 1)
    return x + settings.noise * draws.normal(x) if settings.noise else x


@dataclass(frozen=True)
class _Draws:
    """Draws for a batch of `n`, of which `positions` are taken."""

    n: int
    positions: Tensor | slice
    device: torch.device

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) in [-1, 1]."""
        return (torch.rand(self.n, *shape, device=self.device) * 2 - 1)[self.positions]

    def columns(self, count: int) -> tuple[Tensor, ...]:
        """`count` times (B,) in [-1, 1]."""
        return (torch.rand(count, self.n, device=self.device) * 2 - 1)[:, self.positions].unbind()

    def normal(self, x: Tensor) -> Tensor:
        """As x (B, ...); drawn in the order of indices, whatever the order of x in memory."""
        return torch.randn(self.n, *x.shape[1:], device=self.device, dtype=x.dtype)[self.positions]


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation of the whole batch, of which several processes may hold a share each."""
    found = ranks.current()
    if not found.are_many:
        return x.std()
    wide = x.double()
    n, total, squares = found.total(torch.stack([wide.new_tensor(x.numel()), wide.sum(), wide.square().sum()]))
    return ((squares - total.square() / n) / (n - 1)).clamp_min(0).sqrt().to(x.dtype)


def _affine(x: Tensor, settings: AugmentSettings, draws: _Draws) -> Tensor:
    """(B, 2, 3) maps from output to input positions in [-1, 1]; a turn keeps right angles on images that are not square."""
    angle, scale, right, down, mirror_x, mirror_y = draws.columns(6)
    angle = angle * math.radians(settings.rotate_deg)
    zoom = 1 / (1 + settings.scale * scale)
    flip_x = torch.where(mirror_x < 0, -1.0, 1.0) if settings.flip in {"horizontal", "both"} else torch.ones_like(zoom)
    flip_y = torch.where(mirror_y < 0, -1.0, 1.0) if settings.flip in {"vertical", "both"} else torch.ones_like(zoom)
    aspect = x.shape[2] / x.shape[3]
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = [
        torch.stack([cos * flip_x, -sin * aspect * flip_y, 2 * settings.shift * right], 1),
        torch.stack([sin / aspect * flip_x, cos * flip_y, 2 * settings.shift * down], 1),
    ]
    return torch.stack(rows, 1)
