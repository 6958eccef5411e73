"""Pretrained features, frozen unless said otherwise; `encoder.name: pretrained`.

SqueezeNet 1.0 from a local file with torchvision's key names (Iandola et al. 2016, arXiv 1602.07360), or any timm network where
timm is installed. Features are means (and standard deviations) over the image of one or several layers. No download ever happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.encoders.base import Encoder, EncoderSettings, Shape
from trainer.encoders.weights import load_weights, read_weights
from trainer.errors import DataError

STD_FLOOR = 1e-6
TIMM_MAP = "last"
# Position of each fire module in torchvision's `features`, and its output channels.
FIRES = {
    "fire2": (3, 128),
    "fire3": (4, 128),
    "fire4": (5, 256),
    "fire5": (7, 256),
    "fire6": (8, 384),
    "fire7": (9, 384),
    "fire8": (10, 512),
    "fire9": (12, 512),
}


class PretrainedSettings(EncoderSettings):
    """`model`: squeezenet1_0, or timm:<name>. `layers`: fire2 to fire9 (squeezenet); timm gives its final feature map."""

    name: Literal["pretrained"] = "pretrained"
    model: str = Field("squeezenet1_0", pattern=r"^(squeezenet1_0|timm:.+)$")
    weights: str = Field(
        description="path of a local safetensors file (torchvision's keys for squeezenet1_0, timm's for timm)"
    )
    layers: tuple[str, ...] = ("fire4", "fire8", "fire9")
    pool: Literal["mean", "mean_std"] = "mean"
    trainable: bool = False


class Fire(nn.Module):
    """Squeeze to few channels, expand by 1x1 and 3x3."""

    def __init__(self, width_in: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width_in, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.squeeze(x))
        # The same values as one relu behind the cat, and each is fused into its convolution in the exported graph.
        return torch.cat([torch.relu(self.expand1x1(x)), torch.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """The convolutional part of SqueezeNet 1.0, returning the maps of the chosen layers."""

    def __init__(self, channels: int, layers: tuple[str, ...]) -> None:
        super().__init__()
        pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 96, 7, 2),
            nn.ReLU(),
            pool,
            Fire(96, 16, 64),
            Fire(128, 16, 64),
            Fire(128, 32, 128),
            pool,
            Fire(256, 32, 128),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
            pool,
            Fire(512, 64, 256),
        )
        self.layers = tuple(sorted(set(layers), key=lambda layer: FIRES[layer][0]))
        self.widths = [FIRES[layer][1] for layer in self.layers]

    def maps(self, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """The outputs of `layers`; what lies behind the deepest of them is not computed."""
        names = {FIRES[layer][0]: layer for layer in layers}
        found: dict[str, Tensor] = {}
        for n, layer in enumerate(self.features):
            x = layer(x)
            if n in names:
                found[names[n]] = x
            if len(found) == len(names):
                break
        return found

    def load(self, path: str) -> None:
        """Weights with torchvision's key names."""
        load_weights(self, path, first="features.0.weight", ignore=("classifier.",))


class TimmTrunk(nn.Module):
    """A timm network's last feature map (B, F, h, w), whatever its layout; its weights expect RGB, so grey is given three times."""

    def __init__(self, settings: PretrainedSettings, shape: Shape) -> None:
        super().__init__()
        self.name, self.layers = settings.model, (TIMM_MAP,)
        try:
            import timm
        except ImportError:
            raise DataError(
                f"encoder.model is {self.name}, but timm is not installed; `pip install timm`, or use squeezenet1_0"
            ) from None
        try:
            self.network = timm.create_model(self.name.removeprefix("timm:"), pretrained=False, num_classes=0).eval()
            with torch.no_grad():
                feature_map = self.maps(torch.zeros(1, *shape), self.layers)[TIMM_MAP]
        except (RuntimeError, ValueError, AssertionError) as error:
            raise DataError(
                f"encoder.model is {self.name}, which timm cannot run on {shape[2]}x{shape[1]}: {' '.join(str(error).split())[:200]}"
            ) from None
        self.widths: list[int] = [feature_map.shape[1]]

    def maps(self, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """The final feature map, the only one there is."""
        rgb = x.flip(1) if x.shape[1] == 3 else x.expand(-1, 3, -1, -1)
        found = self.network.forward_features(rgb)
        if found.ndim == 3:  # tokens (B, n, F)
            found = found[:, getattr(self.network, "num_prefix_tokens", 0) :].transpose(1, 2)[..., None]
        elif found.shape[1] != self.network.num_features:  # (B, h, w, F)
            found = found.permute(0, 3, 1, 2)
        return {TIMM_MAP: found}

    def load(self, path: str) -> None:
        """Weights with timm's key names; the classifier's are left out."""
        try:
            missing, _ = self.network.load_state_dict(read_weights(path), strict=False)
        except RuntimeError as error:
            raise DataError(
                f"encoder.weights is {path}, which does not fit {self.name}: {' '.join(str(error).split())[:200]}"
            ) from None
        if missing:
            raise DataError(f"encoder.weights is {path}, which has no tensor '{missing[0]}' for {self.name}")


class PretrainedEncoder(Encoder):
    """x (B, C, H, W), ImageNet-normalised BGR -> pooled features (B, F)."""

    Settings = PretrainedSettings
    settings: PretrainedSettings

    def __init__(self, settings: PretrainedSettings, shape: Shape) -> None:
        super().__init__(settings, shape)
        if settings.model.startswith("timm:"):
            self.trunk: TimmTrunk | SqueezeNet = TimmTrunk(settings, shape)
            self.map_layers = self.trunk.layers
        else:
            self.map_layers = tuple(FIRES)
            unknown = [layer for layer in settings.layers if layer not in FIRES]
            if unknown or not settings.layers:
                raise DataError(
                    f"encoder.layers is {list(settings.layers)}, expected one or more of {', '.join(FIRES)}"
                )
            self.trunk = SqueezeNet(shape[0], settings.layers)
        self.out_dim = sum(self.trunk.widths) * (2 if settings.pool == "mean_std" else 1)
        self.is_trainable = settings.trainable
        self.has_frozen = not settings.trainable
        self.requires_grad_(settings.trainable)

    def load_pretrained(self) -> None:
        self.trunk.load(self.settings.weights)

    def frozen(self, x: Tensor) -> Tensor:
        return x if self.is_trainable else self._pooled(x)

    def head(self, x: Tensor) -> Tensor:
        return self._pooled(x) if self.is_trainable else x

    def with_maps(self, x: Tensor, layers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        self.check_layers(layers)
        maps = self.trunk.maps(x, (*self.trunk.layers, *layers))
        return self._pool([maps[layer] for layer in self.trunk.layers]), {layer: maps[layer] for layer in layers}

    def _pooled(self, x: Tensor) -> Tensor:
        return self._pool(list(self.trunk.maps(x, self.trunk.layers).values()))

    def _pool(self, maps: Sequence[Tensor]) -> Tensor:
        pooled = [m.mean((2, 3)) for m in maps]
        if self.settings.pool == "mean_std":
            # A constant map has variance 0: the root's gradient there is infinite without a floor.
            pooled += [
                (m - m.mean((2, 3), keepdim=True)).square().mean((2, 3)).clamp_min(STD_FLOOR).sqrt() for m in maps
            ]
        return torch.cat(pooled, 1)
