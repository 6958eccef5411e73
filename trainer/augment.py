"""Random changes of training batches that do not change what a part is; `augment:` in YAML, for every method alike.

Source: Guo, Zhu, Liu, Yin, "Deep Embedded Clustering with Data Augmentation" (DEC-DA), ACML 2018: shifts of 10 % and turns of 10
degrees; encoder and decoder learn from changed images, target distributions, labels and centroids come from the clean ones. Differs from the paper: what
comes into view repeats the border instead of black, since a factory background is seldom black.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from configs import Settings


class AugmentSettings(Settings):
    """All draws are uniform in [-value, value], one per image. Choose only changes that a part may show without being another part."""

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


def augment(x: Tensor, settings: AugmentSettings) -> Tensor:
    """Changes a batch of inputs (B, C, H, W) on its device; the draws come from torch's global generator, which the loop seeds per step."""
    if settings.moves:
        grid = nn.functional.affine_grid(_affine(x, settings), list(x.shape), align_corners=False)
        x = nn.functional.grid_sample(x, grid, "bilinear", "border", align_corners=False)
    if settings.contrast:
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (x - mean) * (1 + settings.contrast * _uniform(x))
    if settings.brightness:
        x = x + settings.brightness * x.std() * _uniform(x)
    return x + settings.noise * torch.randn_like(x) if settings.noise else x


def _uniform(x: Tensor) -> Tensor:
    """(B, 1, 1, 1) in [-1, 1]."""
    return torch.rand(len(x), 1, 1, 1, device=x.device) * 2 - 1


def _affine(x: Tensor, settings: AugmentSettings) -> Tensor:
    """(B, 2, 3) maps from output to input positions in [-1, 1]; a turn keeps right angles on images that are not square."""
    angle, scale, right, down, mirror_x, mirror_y = (torch.rand(6, len(x), device=x.device) * 2 - 1).unbind()
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
