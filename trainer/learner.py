"""The training side of a model: its training pixels on the device, batches of them, reconstruction, cached features of what never trains."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer import ranks
from trainer.augment import AugmentSettings, augment
from trainer.errors import DataError
from trainer.feature_store import FeatureStore
from trainer.guards import check_embeddings_finite
from trainer.model import PREDICT_BATCH, ClusterModel, evaluating
from trainer.precision import Format, Precision
from trainer.stored_pixels import Pixels, StoredPixels

SCRATCH = "scratch"  # in the run folder while it trains


@dataclass(frozen=True)
class LearnerOptions:
    """`precision: bf16` (or fp16) runs the training batches' encoder and decoder in it; losses, distances and full passes stay float32.

    `folder`: the run's, for arrays too large to hold twice and for what a method logs; None: memory only.
    """

    seed: int
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    precision: Format = "fp32"
    folder: Path | None = None


@dataclass(frozen=True)
class Supervision:
    """The labels of the training samples (N,), -1: unknown, and the names of the classes. Only methods that are supervised get it."""

    labels: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """What this process does of a batch of `n`: the samples `index` (b,), at `positions` (b,) of the batch."""

    index: Tensor
    positions: Tensor | slice
    n: int


class Learner:
    """`pixels`: (N, h, w, 3 or 1) training pixels; `frozen` (N, F): what the encoder's frozen part gives for them, where it has one; the stem is fitted.

    `decoder`: where the encoder has one and something needs it, else None. `supervision`: of a supervised method, else None.
    Of several processes (trainer/ranks.py) each holds the pixels of its own samples; what `features`, `latents`, `reconstruct` and the full passes
    return is of all samples that were asked for, on all of them.
    """

    def __init__(
        self,
        model: ClusterModel,
        pixels: Pixels,
        options: LearnerOptions,
        frozen: Tensor | None = None,
        supervision: Supervision | None = None,
    ) -> None:
        self.model, self.options, self.seed = model, options, options.seed
        self.device = model.centroids.device
        self.precision = Precision(options.precision, self.device)
        self.ranks = ranks.current()
        self._n = len(pixels)
        own = slice(self.ranks.index, None, self.ranks.count)
        self.pixels = (pixels[own] if isinstance(pixels, Tensor) else pixels.take(own)).to(self.device)
        self.decoder: nn.Module | None = None
        self.supervision = supervision
        self._inputs = None if frozen is None else self._stem(frozen)

    def __len__(self) -> int:
        return self._n

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

    def share(self, index: Tensor) -> Share:
        """Of samples `index` (B,), those of this process."""
        if not self.ranks.are_many:
            return Share(index, slice(None), len(index))
        positions = self.ranks.own(index)
        return Share(index[positions], positions, len(index))

    def whole(self, rows: Tensor, share: Share) -> Tensor:
        """Rows (n, ...) of the whole batch, on every process, from those of each one's share (b, ...)."""
        if isinstance(share.positions, slice):
            return rows
        return self.ranks.assemble(rows, share.positions, share.n)

    @property
    def shared_parameters(self) -> list[nn.Parameter]:
        """Those whose gradient each process knows of its own samples alone: of what lies before the rows are put together."""
        modules: list[nn.Module] = [self.model.encoder, *([] if self.decoder is None else [self.decoder])]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def spread(self) -> None:
        """Gives all processes what the first one has learned; the same already, unless their processors round differently."""
        modules = [self.model, *([] if self.decoder is None else [self.decoder])]
        self.ranks.spread([tensor for module in modules for tensor in module.state_dict().values()])

    def announce(self, index: Tensor) -> None:
        """Samples that come next: what lies on disk is fetched meanwhile."""
        if isinstance(self.pixels, StoredPixels) and self._inputs is None:
            self.pixels.prefetch(self.share(index).index // self.ranks.count)

    def batch(self, share: Share) -> Tensor:
        """What the trained part of the encoder sees of a share while training: changed as `augment:` says."""
        if self.options.augment.is_identity:
            return self._clean(share.index)
        changed = augment(self._normalised(share.index), self.options.augment, share.positions, share.n)
        return self._stem(self.model.encoder.frozen(changed))

    def features(self, index: Tensor) -> Tensor:
        """Encoder features (B, F) of a training batch, with gradients."""
        share = self.share(index)
        return self.whole(self._head(self.batch(share)), share)

    def latents(self, index: Tensor) -> Tensor:
        """Embeddings in cluster space (B, D) of a training batch, with gradients."""
        return self._to_latents(self.features(index))

    @torch.no_grad()
    def clean_latents(self, index: Tensor) -> Tensor:
        """Embeddings in cluster space (B, D) of samples `index` as they are."""
        share = self.share(index)
        with evaluating(self.model.encoder):  # else batch norm's statistics would follow each batch twice
            return self._to_latents(self.whole(self._head(self._clean(share.index)), share))

    def reconstruct(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings in cluster space (B, D), and the squared error of the reconstruction (B,), summed over an image's elements."""
        decoder = self.need_decoder("the loss")
        share = self.share(index)
        x = self.batch(share)
        features = self._head(x)
        with self.autocast():
            output = decoder(features)
        error = nn.functional.mse_loss(output.float(), x, reduction="none").flatten(1).sum(1)
        return self._to_latents(self.whole(features, share)), self.whole(error, share)

    @functools.cached_property
    def elements(self) -> int:
        """Elements of one reconstruction: d in the papers."""
        return self._clean(torch.zeros(0, dtype=torch.int64, device=self.device)).shape[1:].numel()

    @torch.no_grad()
    def all_features(self, as_trained: bool = False) -> Tensor:
        """Features (N, F) of all training samples as they are, in eval mode; `as_trained`: in the precision of training batches.

        Raises:
            CollapseError: they are not finite.
        """
        found = torch.empty(0)
        # Entered once: autocast then turns each weight once, not once per batch.
        with self.autocast() if as_trained else contextlib.nullcontext():
            for index, rows in self.feature_batches():
                if not len(found):  # made once: joined from batches they would be held twice
                    found = rows.new_empty(len(self), rows.shape[1])
                found[index] = rows
        return check_embeddings_finite(found)

    @torch.no_grad()
    def feature_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices (B,) and features (B, F) of all training samples, in order, in eval mode."""
        encoder = self.model.encoder
        with evaluating(encoder):
            for index in torch.arange(len(self), device=self.device).split(PREDICT_BATCH * self.ranks.count):
                share = self.share(index)
                yield index, self.whole(encoder.head(self._clean(share.index)).float(), share)

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
    def all_latents(self, as_trained: bool = False) -> Tensor:
        """Embeddings in cluster space (N, D) of all training samples, in eval mode."""
        return self._to_latents(self.all_features(as_trained))

    def _normalised(self, index: Tensor) -> Tensor:
        rows = index // self.ranks.count
        # Copies whole images; an index goes pixel by pixel, which on a CPU takes ten times as long.
        some = self.pixels.index_select(0, rows) if isinstance(self.pixels, Tensor) else self.pixels[rows]
        return self.model.preprocess.normalise(some)

    def _clean(self, index: Tensor) -> Tensor:
        """What the encoder's head sees of this process's samples `index` as they are."""
        return self._normalised(index) if self._inputs is None else self._inputs[index]

    @torch.no_grad()
    def _stem(self, frozen: Tensor) -> Tensor:
        return self.model.encoder.stem(frozen)

    def _head(self, x: Tensor) -> Tensor:
        with self.autocast():
            return self.model.encoder.head(x).float()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The precision of training batches."""
        return self.precision.autocast()

    def _to_latents(self, features: Tensor) -> Tensor:
        return self.model.projection.to_cluster_space(self.model.projection(features))
