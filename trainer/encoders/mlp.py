"""Fully connected encoder d-500-500-2000-10, mirrored decoder; `encoder.name: mlp`.

Source: Xie, Girshick, Farhadi 2016 (arXiv 1511.06335) section 4.3; ReLU everywhere except bottleneck and reconstruction.
Differs from the paper: PyTorch's initial weights (uniform, 1/sqrt(fan_in)) instead of N(0, 0.01^2). `init: glorot` gives those of Glorot and
Bengio 2010, uniform, sqrt(6 / (fan_in + fan_out)), biases 0: embeddings begin about ten times as wide, which methods without pre-training need.
`negative_slope` above 0 makes the units leaky (Maas, Hannun, Ng 2013), ClustPy's .01 for example.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from trainer.encoders.base import Encoder, EncoderSettings, Shape
from trainer.encoders.dense import Dense


class MLPSettings(EncoderSettings):
    """Sizes of the hidden layers and of the embedding; `init`: the weights at the start; `negative_slope` of the hidden units, 0 is ReLU."""

    name: Literal["mlp"] = "mlp"
    hidden: tuple[int, ...] = (500, 500, 2000)
    dim: int = Field(10, ge=1)
    init: Literal["default", "glorot"] = "default"
    negative_slope: float = Field(0.0, ge=0, lt=1)


class MLPEncoder(Encoder):
    """Pixels, flattened -> features (B, dim)."""

    Settings = MLPSettings
    settings: MLPSettings

    def __init__(self, settings: MLPSettings, shape: Shape) -> None:
        super().__init__(settings, shape)
        self.out_dim = settings.dim
        widths = [shape[0] * shape[1] * shape[2], *settings.hidden, settings.dim]
        self.widths = list(pairwise(widths))
        self.init, self.slope = settings.init, settings.negative_slope
        self.layers = _layers(self.widths, self.init)

    def head(self, x: Tensor) -> Tensor:
        h = x.flatten(1)  # (B, C*H*W)
        for layer in self.layers[:-1]:
            h = layer(h, self.slope)
        return self.layers[-1](h)

    def build_decoder(self) -> nn.Module:
        return MLPDecoder(self)


class MLPDecoder(nn.Module):
    """The mirror: features (B, dim) -> (B, C, H, W); layer l undoes the encoder's layer -1-l."""

    def __init__(self, encoder: MLPEncoder) -> None:
        super().__init__()
        self.shape, self.slope = encoder.shape, encoder.slope
        self.layers = _layers([(b, a) for a, b in reversed(encoder.widths)], encoder.init)

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            z = layer(z, self.slope)
        return self.layers[-1](z).unflatten(1, self.shape)


def _layers(widths: list[tuple[int, int]], init: Literal["default", "glorot"]) -> nn.ModuleList:
    layers = [Dense(a, b) for a, b in widths]
    if init == "glorot":
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.ModuleList(layers)
