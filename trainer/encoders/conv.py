"""Convolutional encoder for small images, with a mirrored decoder; `encoder.name: conv`.

Source: Guo et al., "Deep Clustering with Convolutional Autoencoders" (DCEC), 2017: conv5/s2, conv5/s2, conv3/s2, linear.
Differs from the paper: 'same' padding in all three layers, so that any height and width from 8 on works.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.encoders.base import Encoder, EncoderSettings, Shape
from trainer.encoders.batch_norm import BatchNorm2d
from trainer.encoders.sobel import CHANNELS as SOBEL_CHANNELS
from trainer.encoders.sobel import Sobel
from trainer.errors import DataError


class ConvSettings(EncoderSettings):
    """Channels of the three layers and the size of the embedding; `sobel` shows it edges instead of colours.

    `batch_norm` after each convolution: for methods that train without a reconstruction, from scratch.
    """

    name: Literal["conv"] = "conv"
    channels: tuple[int, int, int] = (32, 64, 128)
    dim: int = Field(10, ge=1)
    sobel: bool = False
    batch_norm: bool = False


class ConvEncoder(Encoder):
    """x (B, C, H, W) -> features (B, dim)."""

    Settings = ConvSettings
    settings: ConvSettings
    map_layers = ("conv1", "conv2", "conv3")

    def __init__(self, settings: ConvSettings, shape: Shape) -> None:
        super().__init__(settings, shape)
        channels, height, width = shape
        if min(height, width) < 8:
            raise DataError(
                f"encoder conv halves the image three times, but its input is {width}x{height}, expected at least 8x8; use encoder mlp"
            )
        a, b, c = settings.channels
        self.front = Sobel() if settings.sobel else nn.Identity()
        self.conv1 = nn.Conv2d(SOBEL_CHANNELS if settings.sobel else channels, a, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(a, b, 5, stride=2, padding=2)
        self.conv3 = nn.Conv2d(b, c, 3, stride=2, padding=1)
        self.norms = nn.ModuleList(BatchNorm2d(n) if settings.batch_norm else nn.Identity() for n in (a, b, c))
        self.inner = (c, -(-height // 8), -(-width // 8))  # after three halvings, rounded up
        self.out_dim = settings.dim
        self.linear = nn.Linear(self.inner[0] * self.inner[1] * self.inner[2], settings.dim)

    def head(self, x: Tensor) -> Tensor:
        return self.with_maps(x, ())[0]

    def with_maps(self, x: Tensor, layers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        self.check_layers(layers)
        x = self.front(x)
        maps = {}
        for name, norm in zip(self.map_layers, self.norms, strict=True):
            x = maps[name] = torch.relu(norm(self.get_submodule(name)(x)))
        return self.linear(x.flatten(1)), {name: maps[name] for name in layers}

    def build_decoder(self) -> nn.Module:
        return ConvDecoder(self.out_dim, self.inner, self.settings.channels[1::-1], self.shape)


class ConvDecoder(nn.Module):
    """features (B, dim) -> (B, C, H, W): linear, then one doubling per entry of `channels` and one to the image."""

    def __init__(self, dim: int, inner: Shape, channels: tuple[int, ...], shape: Shape) -> None:
        super().__init__()
        self.inner, self.shape = inner, shape
        self.linear = nn.Linear(dim, inner[0] * inner[1] * inner[2])
        widths = [inner[0], *channels, shape[0]]
        self.layers = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))

    def forward(self, z: Tensor) -> Tensor:
        x = torch.relu(self.linear(z)).unflatten(1, self.inner)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)[:, :, : self.shape[1], : self.shape[2]]
