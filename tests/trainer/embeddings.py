"""Embeddings that k-means cuts wrongly."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def strips(each: int = 150) -> tuple[Tensor, Tensor]:
    """Two long strips side by side on the sphere, 100 degrees long and 28 apart: k-means cuts both across."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(2 * each) % 2
    along = (torch.rand(2 * each, generator=generator) - 0.5) * math.radians(100)
    across = (truth * 2 - 1) * math.radians(14) + 0.03 * torch.randn(2 * each, generator=generator)
    return torch.stack([along.cos() * across.cos(), along.sin() * across.cos(), across.sin()], 1), truth
