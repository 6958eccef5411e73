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
    """x (B, C, H, W), normalised -> frozen -> stem -> head -> features (B, F).

    `frozen` never changes, `stem` is fitted once to what it gives, `head` trains. Most encoders are all head.
    Subclasses hold their frozen `Settings`, whose `name` is the key in YAML.
    """

    Settings: ClassVar[type[EncoderSettings]]
    out_dim: int
    is_trainable: bool = True
    has_frozen: bool = False

    def __init__(self, settings: EncoderSettings, shape: Shape) -> None:
        super().__init__()
        self.settings, self.shape = settings, shape

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(self.frozen(x)))

    def frozen(self, x: Tensor) -> Tensor:
        """The part that never changes, whose outputs are computed once per image."""
        return x

    def stem(self, x: Tensor) -> Tensor:
        """The part that is fitted once, before training."""
        return x

    def head(self, x: Tensor) -> Tensor:
        """The part that trains."""
        raise TypeError(f"{type(self).__name__} has no head")

    def load_pretrained(self) -> None:
        """Loads the weights that the settings name; `fit` calls it once, a saved run brings its own."""

    def fit_stem(self, features: Tensor) -> None:
        """Fits the stem to what the frozen part gave (N, F) for the training images."""

    def build_decoder(self) -> nn.Module | None:
        """A decoder features (B, F) -> what the head sees, to pre-train with; None where there is none."""
        return None
