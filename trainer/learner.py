"""The training side of a model: its training pixels on the device, batches of them, reconstruction, cached features of what never trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.augment import AugmentSettings, augment
from trainer.errors import DataError
from trainer.feature_store import FeatureStore
from trainer.model import PREDICT_BATCH, ClusterModel, evaluating

SCRATCH = "scratch"  # in the run folder while it trains


@dataclass(frozen=True)
class LearnerOptions:
    """`precision: bf16` runs the training batches' encoder and decoder in bfloat16; losses, distances and full passes stay float32.

    `folder`: the run's, for arrays too large to hold twice and for what a method logs; None: memory only.
    """

    seed: int
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    precision: str = "fp32"
    folder: Path | None = None


@dataclass(frozen=True)
class Supervision:
    """The labels of the training samples (N,), -1: unknown, and the names of the classes. Only methods that are supervised get it."""

    labels: Tensor
    classes: tuple[str, ...]


class Learner:
    """`pixels`: (N, h, w, 3 or 1) training pixels; `frozen` (N, F): what the encoder's frozen part gives for them, where it has one; the stem is fitted.

    `decoder`: where the encoder has one and something needs it, else None. `supervision`: of a supervised method, else None.
    """

    def __init__(
        self,
        model: ClusterModel,
        pixels: Tensor,
        options: LearnerOptions,
        frozen: Tensor | None = None,
        supervision: Supervision | None = None,
    ) -> None:
        self.model, self.options, self.seed = model, options, options.seed
        self.device = model.centroids.device
        self.pixels = pixels.to(self.device)
        self.decoder: nn.Module | None = None
        self.supervision = supervision
        self._inputs = None if frozen is None else self._stem(frozen)

    def __len__(self) -> int:
        return len(self.pixels)

    def need_decoder(self, why: str) -> nn.Module:
        """The decoder, built at the first call.

        Raises:
            DataError: the encoder has none; `why` is the setting that asks for it.
        """
        if self.decoder is None:
            decoder = self.model.encoder.build_decoder() if self.model.encoder.is_trainable else None
            if decoder is None:
                raise DataError(
                    f"{why} needs a reconstruction, but encoder {self.model.encoder.settings.name} has no decoder (or is "
                    f"frozen), expected encoder mlp, conv, resnet or feature_mlp, which reconstructs pretrained features"
                )
            self.decoder = decoder.to(self.device)
        return self.decoder

    def need_classes(self, why: str, otherwise: str) -> Supervision:
        """The labels of the training samples, for a method that learns from at least two classes.

        Raises:
            DataError: there are fewer; `why` is the setting that asks for them, `otherwise` what else there is to do.
        """
        labels = torch.zeros(0, dtype=torch.int64) if self.supervision is None else self.supervision.labels
        found = len(torch.unique(labels[labels >= 0]))
        if self.supervision is None or found < 2:
            raise DataError(
                f"{why}, which learns from class folders, but data.path has {found} of them among the training images, "
                f"expected at least 2; {otherwise}"
            )
        return self.supervision

    def batch(self, index: Tensor) -> Tensor:
        """What the trained part of the encoder sees of samples `index` (B,) while training: changed as `augment:` says."""
        if self.options.augment.is_identity:
            return self._clean(index)
        changed = augment(self._normalised(index), self.options.augment)
        return self._stem(self.model.encoder.frozen(changed))

    def features(self, index: Tensor) -> Tensor:
        """Encoder features (B, F) of a training batch, with gradients."""
        return self._head(self.batch(index))

    def latents(self, index: Tensor) -> Tensor:
        """Embeddings in cluster space (B, D) of a training batch, with gradients."""
        return self._to_latents(self.features(index))

    @torch.no_grad()
    def clean_latents(self, index: Tensor) -> Tensor:
        """Embeddings in cluster space (B, D) of samples `index` as they are."""
        return self._to_latents(self._head(self._clean(index)))

    def reconstruct(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings in cluster space (B, D), and the squared error of the reconstruction (B,), summed over an image's elements."""
        decoder = self.need_decoder("the loss")
        x = self.batch(index)
        features = self._head(x)
        with self.autocast():
            output = decoder(features)
        return self._to_latents(features), (output.float() - x).square().flatten(1).sum(1)

    @property
    def elements(self) -> int:
        """Elements of one reconstruction: d in the papers."""
        return self._clean(torch.zeros(1, dtype=torch.int64, device=self.device)).numel()

    @torch.no_grad()
    def all_features(self) -> Tensor:
        """Features (N, F) of all training samples as they are, in eval mode."""
        return torch.cat([rows for _, rows in self.feature_batches()])

    @torch.no_grad()
    def feature_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices (B,) and features (B, F) of all training samples, in order, in eval mode."""
        encoder = self.model.encoder
        with evaluating(encoder):
            for index in torch.arange(len(self), device=self.device).split(PREDICT_BATCH):
                yield index, encoder.head(self._clean(index))

    @torch.no_grad()
    def stored_features(self, name: str) -> FeatureStore:
        """Features (N, F) of all training samples as they are, in eval mode, in a file `name` of the run's scratch folder where it has one."""
        folder = self.options.folder
        store = FeatureStore(
            len(self), self.model.encoder.out_dim, None if folder is None else folder / SCRATCH / f"{name}.f32"
        )
        for index, rows in self.feature_batches():
            store.write(index, rows)
        return store

    @torch.no_grad()
    def all_latents(self) -> Tensor:
        """Embeddings in cluster space (N, D) of all training samples, in eval mode."""
        return self._to_latents(self.all_features())

    def _normalised(self, index: Tensor) -> Tensor:
        return self.model.preprocess.normalise(self.pixels[index])

    def _clean(self, index: Tensor) -> Tensor:
        """What the encoder's head sees of samples as they are."""
        return self._normalised(index) if self._inputs is None else self._inputs[index]

    @torch.no_grad()
    def _stem(self, frozen: Tensor) -> Tensor:
        return self.model.encoder.stem(frozen)

    def _head(self, x: Tensor) -> Tensor:
        with self.autocast():
            return self.model.encoder.head(x).float()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The precision of training batches."""
        if self.options.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _to_latents(self, features: Tensor) -> Tensor:
        return self.model.projection.to_cluster_space(self.model.projection(features))
