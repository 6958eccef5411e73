"""What every encoder offers: features, and where it can be trained as an autoencoder, a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from configs import Settings
from trainer.errors import DataError

Shape = tuple[int, int, int]  # C, H, W of the input


class EncoderSettings(Settings):
    """`name` is the key in ENCODERS."""

    name: str


class Encoder(nn.Module):
    """x (B, C, H, W), normalised -> frozen -> stem -> head -> features (B, F).

    `frozen` never changes, `stem` is fitted once to what it gives, `head` trains. Most encoders are all head.
    Subclasses hold their frozen `Settings`, whose `name` is the key in YAML. `map_layers` names the feature maps that `with_maps` gives,
    from the first to the deepest; none where the encoder has no maps.
    """

    Settings: ClassVar[type[EncoderSettings]]
    out_dim: int
    is_trainable: bool = True
    has_frozen: bool = False
    map_layers: tuple[str, ...] = ()

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

    def with_maps(self, x: Tensor, layers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Features (B, F) as `forward` gives them, and the maps (B, C, h, w) of `layers`, in one pass.

        Raises:
            DataError: the encoder has no such map.
        """
        self.check_layers(layers)
        raise TypeError(f"{type(self).__name__} names its maps and does not give them")

    def check_layers(self, layers: Sequence[str]) -> None:
        """Raises DataError where `layers` are not among `map_layers`, or there are no maps at all."""
        if not self.map_layers:
            raise DataError(
                f"encoder {self.settings.name} has no feature maps, which novelty.bank looks at; leave novelty.bank out"
            )
        unknown = [layer for layer in layers if layer not in self.map_layers]
        if unknown:
            there = ", ".join(self.map_layers)
            raise DataError(
                f"novelty.bank.layers names '{unknown[0]}', which encoder {self.settings.name} does not have; it has {there}"
            )

    def load_pretrained(self) -> None:
        """Loads the weights that the settings name; `fit` calls it once, a saved run brings its own."""

    def fit_stem(self, features: Tensor) -> None:
        """Fits the stem to what the frozen part gave (N, F) for the training images."""

    def build_decoder(self) -> nn.Module | None:
        """A decoder features (B, F) -> what the head sees, to pre-train with; None where there is none."""
        return None
