"""Outputs of chosen layers of an encoder, one row per sample: pooled over the image and brought to one scale."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from trainer.errors import DataError

FEATURES = "features"  # the encoder's own output


class LayerTap:
    """Reads `layers` of `encoder`: names of its submodules, or `features`. Rows have mean 0 and variance 1 (layer norm without weights).

    Unnormalised maps differ in scale from layer to layer, and would need a weight each; unpooled ones are 25,000 numbers per image.

    Raises:
        DataError: the encoder has no such layer.
    """

    def __init__(self, encoder: nn.Module, layers: Sequence[str], setting: str) -> None:
        known = dict(encoder.named_modules())
        missing = [layer for layer in layers if layer != FEATURES and layer not in known]
        if missing:
            there = ", ".join([FEATURES, *(name for name in known if name and name.count(".") < 2)])
            raise DataError(f"{setting} names '{missing[0]}', which the encoder does not have, expected one of {there}")
        self.layers = tuple(layers)
        self._modules = {layer: known[layer] for layer in layers if layer != FEATURES}
        self._caught: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, passes through the encoder are caught."""
        handles = [module.register_forward_hook(self._catcher(layer)) for layer, module in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._caught.clear()

    def outputs(self, features: Tensor) -> list[Tensor]:
        """What each layer gave in the pass that gave `features` (B, F), as it left the layer, with gradients."""
        return [features if layer == FEATURES else self._caught[layer] for layer in self.layers]

    def rows(self, features: Tensor) -> list[Tensor]:
        """(B, D) of each layer for the pass that gave `features` (B, F), with gradients."""
        return [row_of(x) for x in self.outputs(features)]

    def _catcher(self, layer: str) -> Callable[[nn.Module, object, Tensor], None]:
        def catch(module: nn.Module, inputs: object, output: Tensor) -> None:
            self._caught[layer] = output

        return catch


def row_of(x: Tensor) -> Tensor:
    """(B, D), pooled and normalised, of a layer's output (B, D) or (B, D, h, w)."""
    pooled = x.flatten(2).mean(2) if x.ndim > 2 else x
    return nn.functional.layer_norm(pooled.float(), pooled.shape[1:])
