"""Autoencoder pre-training as stages: end to end, or greedily layer by layer with denoising.

Source: Xie, Girshick, Farhadi 2016 (arXiv 1511.06335) section 4.3, after Vincent et al., "Stacked denoising autoencoders", 2010.
As in the authors' code: no dropout on the raw input of layer 1 nor on the embedding, 20 % on the other layers' inputs and hidden units.
Differs from the paper: the schedule is in epochs; momentum is not ramped up; biases share the weights' learning rate.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from configs import Settings
from trainer.encoders.mlp import MLPDecoder, MLPEncoder
from trainer.errors import DataError
from trainer.learner import Learner, Share
from trainer.stage import OptimizerSettings, Stage


class PretrainSettings(Settings):
    """`epochs` of end-to-end reconstruction; `layer_epochs` for each layer before that with `layerwise`. `noise` is the dropout rate there.

    `from` takes the pre-trained autoencoder of another run on the same images; `cache` is a folder where every run leaves its own and
    finds those of equal recipe and seed.
    """

    kind: Literal["end_to_end", "layerwise", "none"] = "end_to_end"
    epochs: int = Field(100, ge=1)
    layer_epochs: int = Field(50, ge=1)
    noise: float = Field(0.2, ge=0, lt=1)
    optimizer: OptimizerSettings = OptimizerSettings()
    from_run: str | None = Field(None, alias="from", description="a run folder; its autoencoder is taken")
    cache: str | None = Field(None, description="a folder of autoencoders, shared by runs")

    @model_validator(mode="after")
    def _something_to_take(self) -> PretrainSettings:
        if self.kind == "none" and self.from_run is not None:
            raise ValueError(
                f"from is {self.from_run} with kind none, expected kind end_to_end or layerwise, or no from"
            )
        return self


def pretrain_stages(settings: PretrainSettings, learner: Learner, batch_size: int) -> list[Stage]:
    """The stages that train encoder and decoder to reconstruct; none for a frozen encoder. Sets `learner.decoder`.

    Raises:
        DataError: the settings ask for what the encoder does not have.
    """
    encoder = learner.model.encoder
    if settings.kind == "none" or not encoder.is_trainable:
        return []
    decoder = learner.need_decoder(f"pretrain.kind {settings.kind}")
    stages = _layerwise(settings, learner, batch_size) if settings.kind == "layerwise" else []

    def loss(index: Tensor) -> Tensor:
        return learner.reconstruct(index)[1].mean() / learner.elements  # mean over all elements: sum / (B d)

    parameters = [p for p in (*encoder.parameters(), *decoder.parameters()) if p.requires_grad]
    return [
        *stages,
        Stage("reconstruct", settings.epochs, batch_size, settings.optimizer, parameters, loss, [encoder, decoder]),
    ]


def _layerwise(settings: PretrainSettings, learner: Learner, batch_size: int) -> list[Stage]:
    encoder, decoder = learner.model.encoder, learner.decoder
    if not isinstance(encoder, MLPEncoder) or not isinstance(decoder, MLPDecoder):
        raise DataError("pretrain.kind is layerwise, which stacks fully connected layers, expected encoder.name: mlp")
    return [
        Stage(
            f"layer{n + 1}",
            settings.layer_epochs,
            batch_size,
            settings.optimizer,
            [*encoder.layers[n].parameters(), *decoder.layers[-1 - n].parameters()],
            _LayerLoss(settings.noise, learner, encoder, decoder, n),
        )
        for n in range(len(encoder.layers))
    ]


class _LayerLoss:
    """Denoising reconstruction of layer n's clean input by encoder layer n and its mirror; earlier layers are fixed."""

    def __init__(self, noise: float, learner: Learner, encoder: MLPEncoder, decoder: MLPDecoder, n: int) -> None:
        self.noise, self.learner, self.n = noise, learner, n
        self.encoder, self.layer, self.mirror = encoder, encoder.layers[n], decoder.layers[-1 - n]
        self.is_first, self.is_last = n == 0, n == len(encoder.layers) - 1

    def __call__(self, index: Tensor) -> Tensor:
        share = self.learner.share(index)
        return self.learner.whole(self._errors(share), share).mean()

    def _errors(self, share: Share) -> Tensor:
        """Mean squared errors (b,) of a share."""
        with torch.no_grad():
            clean = self.learner.batch(share).flatten(1)
            for layer in self.encoder.layers[: self.n]:
                clean = torch.relu(layer(clean))
        with self.learner.autocast():
            hidden = self.layer(clean if self.is_first else self._dropped(clean, share))
            if not self.is_last:
                hidden = self._dropped(torch.relu(hidden), share)
            output = self.mirror(hidden).float()
        # The raw input may be negative, every other layer's input went through a ReLU.
        return ((output if self.is_first else torch.relu(output)) - clean).square().mean(1)

    def _dropped(self, x: Tensor, share: Share) -> Tensor:
        """Dropout, drawn for the whole batch that several processes share."""
        if isinstance(share.positions, slice):
            return nn.functional.dropout(x, self.noise)
        return x * nn.functional.dropout(x.new_ones(share.n, *x.shape[1:]), self.noise)[share.positions]
