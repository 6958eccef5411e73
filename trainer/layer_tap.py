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

    Args:
        run: sends a batch through the encoder as training does, to see which modules speak: not all are called, and frozen ones only once.

    Raises:
        DataError: naming `setting`: the encoder has no such layer, or it gives nothing.
    """

    def __init__(self, encoder: nn.Module, layers: Sequence[str], setting: str, run: Callable[[], object]) -> None:
        self.layers = tuple(layers)
        self._caught: dict[str, Tensor] = {}
        self._modules = {name: module for name, module in encoder.named_modules() if name}
        with self.listening():
            run()
            speaking = {name: module for name, module in self._modules.items() if name in self._caught}
        missing = [layer for layer in layers if layer != FEATURES and layer not in speaking]
        if missing:
            raise DataError(
                f"{setting} names '{missing[0]}', which gives nothing while the encoder trains, expected one of "
                f"{', '.join([FEATURES, *speaking])}"
            )
        self._modules = {layer: speaking[layer] for layer in layers if layer != FEATURES}

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
            if isinstance(output, Tensor):
                self._caught[layer] = output

        return catch


def row_of(x: Tensor) -> Tensor:
    """(B, D), pooled and normalised, of a layer's output (B, D) or (B, D, h, w)."""
    pooled = x.flatten(2).mean(2) if x.ndim > 2 else x
    return nn.functional.layer_norm(pooled.float(), pooled.shape[1:])
