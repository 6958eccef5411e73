"""ResNet-18 encoder, pooled features or a linear embedding; `encoder.name: resnet`.

Source: He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv 1512.03385. Key names are torchvision's, so that
its weights load from a safetensors file. Differs from the paper: no classifier; a small transposed-convolution decoder for pre-training.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from trainer.encoders.base import Encoder, EncoderSettings, Shape
from trainer.encoders.batch_norm import BatchNorm2d
from trainer.encoders.conv import ConvDecoder
from trainer.encoders.sobel import CHANNELS as SOBEL_CHANNELS
from trainer.encoders.sobel import Sobel
from trainer.encoders.weights import load_weights


class ResNetSettings(EncoderSettings):
    """`dim` None: the 512 pooled features themselves. `sobel` shows it edges instead of colours (then without `weights`)."""

    name: Literal["resnet"] = "resnet"
    dim: int | None = Field(None, ge=1)
    weights: str | None = Field(None, description="a safetensors file with torchvision's key names; its input is RGB")
    trainable: bool = True
    sobel: bool = False

    @model_validator(mode="after")
    def _weights_expect_colours(self) -> ResNetSettings:
        if self.sobel and self.weights is not None:
            raise ValueError(f"sobel is true, but weights {self.weights} expect colours; leave one of them out")
        return self


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm2d(width)
        if stride != 1 or width_in != width:
            self.downsample: nn.Module = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), BatchNorm2d(width)
            )
        else:
            self.downsample = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(h)) + self.downsample(x))


class ResNetEncoder(Encoder):
    """x (B, C, H, W) -> features (B, 512) or (B, dim)."""

    Settings = ResNetSettings
    settings: ResNetSettings
    map_layers = ("layer1", "layer2", "layer3", "layer4")

    def __init__(self, settings: ResNetSettings, shape: Shape) -> None:
        super().__init__(settings, shape)
        self.front = Sobel() if settings.sobel else nn.Identity()
        self.conv1 = nn.Conv2d(SOBEL_CHANNELS if settings.sobel else shape[0], 64, 7, 2, 3, bias=False)
        self.bn1 = BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = (64, 64, 128, 256, 512)
        for n, (width_in, width) in enumerate(pairwise(widths), 1):
            self.add_module(
                f"layer{n}", nn.Sequential(Block(width_in, width, 1 if n == 1 else 2), Block(width, width, 1))
            )
        self.embed = nn.Identity() if settings.dim is None else nn.Linear(512, settings.dim)
        self.out_dim = settings.dim or 512
        self.is_trainable = settings.trainable
        self.requires_grad_(settings.trainable)

    def head(self, x: Tensor) -> Tensor:
        return self.with_maps(x, ())[0]

    def with_maps(self, x: Tensor, layers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        self.check_layers(layers)
        x = self.maxpool(torch.relu(self.bn1(self.conv1(self.front(x)))))
        maps = {}
        for name in self.map_layers:
            x = maps[name] = self.get_submodule(name)(x)
        return self.embed(x.mean((2, 3))), {name: maps[name] for name in layers}

    def load_pretrained(self) -> None:
        if self.settings.weights is not None:
            load_weights(self, self.settings.weights, first="conv1.weight", ignore=("fc.",), own=("embed.",))

    def build_decoder(self) -> nn.Module:
        _, height, width = self.shape
        return ConvDecoder(self.out_dim, (256, -(-height // 32), -(-width // 32)), (128, 64, 32, 16), self.shape)
