"""What every encoder offers: features, and where it can be trained as an autoencoder, a decoder."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from configs import Settings

Shape = tuple[int, int, int]  # C, H, W of the input


class EncoderSettings(Settings):
    """`name` is the key in ENCODERS."""

    name: str


class Encoder(nn.Module):
    """x (B, C, H, W), normalised -> features (B, F). Subclasses hold their frozen `Settings`, whose `name` is the key in YAML."""

    Settings: ClassVar[type[EncoderSettings]]
    out_dim: int
    is_trainable: bool = True

    def __init__(self, settings: EncoderSettings, shape: Shape) -> None:
        super().__init__()
        self.settings, self.shape = settings, shape

    def forward(self, x: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no forward")

    def load_pretrained(self) -> None:
        """Loads the weights that the settings name; `fit` calls it once, a saved run brings its own."""

    def build_decoder(self) -> nn.Module | None:
        """A decoder features (B, F) -> (B, C, H, W) to pre-train with; None where there is none."""
        return None
