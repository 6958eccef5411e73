"""Stochastic quantization on a triplet encoder: classes pulled apart where labels exist, then K centroids by one pass; `method.name: stochastic_quantization`.

Sources: Kozyriev and Norkin, "Robust clustering on high-dimensional data with stochastic quantization", arXiv 2409.02066;
trainer/triplet.py (the encoder's loss), trainer/clustering/stochastic_quantization.py (the centroids). In three steps:
1. the encoder learns from the labelled images alone, in batches of several classes with several images each, as many steps whatever
   the share of labels (with fewer steps, few labels would fail for lack of training, not of labels);
2. all images, labelled or not, are embedded;
3. the centroids start at a labelled image of each class, or by k-means++, and quantize the embeddings in one pass or more.
A cluster takes the name of the class that most of its labelled images have; below `min_purity` it is named "unsure". Differs from the
paper: any of our encoders; a larger embedding; steps that shrink, as its theorem asks. Without `triplet` it needs no labels.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from configs import Settings
from trainer import ranks
from trainer.cluster_names import class_names
from trainer.clustering.stochastic_quantization import Optimizer, QuantizationOptions, StochasticQuantizer
from trainer.distance import nearest
from trainer.errors import CollapseError, DataError
from trainer.guards import MIN_SPREAD_SHARE
from trainer.learner import Learner
from trainer.methods.staged import StagedMethod, StagedSettings
from trainer.samplers import classes_by_images
from trainer.stage import EpochReport, OptimizerSettings, Stage
from trainer.triplet import triplet_loss


class TripletSettings(Settings):
    """`labelled_share` of the labelled images are used, the others count as unlabelled. `classes_per_batch` at most share a batch."""

    epochs: int = Field(50, ge=1)
    margin: float = Field(1.0, gt=0)
    labelled_share: float = Field(1.0, gt=0, le=1)
    classes_per_batch: int = Field(10, ge=2)


class StochasticQuantizationSettings(StagedSettings):
    """`r` of |z - mu|^r: 2 is k-means, less resists outliers. `init: classes` starts one centroid at each class and needs n_clusters = classes."""

    name: Literal["stochastic_quantization"] = "stochastic_quantization"
    triplet: TripletSettings | Literal["none"] = TripletSettings()
    r: float = Field(2.0, ge=1)
    init: Literal["classes", "++", "random"] = "++"
    quantizer: Optimizer = "sgd"
    rho0: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    decay: float = Field(0.75, gt=0.5, le=1)
    passes: int = Field(1, ge=1)
    min_purity: float = Field(0.6, ge=0, le=1)
    optimizer: OptimizerSettings = OptimizerSettings(kind="adam", lr=1e-3, weight_decay=1e-5)

    @model_validator(mode="after")
    def _classes_need_labels(self) -> StochasticQuantizationSettings:
        if self.triplet == "none" and self.init == "classes":
            raise ValueError("init is classes with triplet none, which uses no labels, expected init ++ or random")
        return self


class StochasticQuantization(StagedMethod):
    """`labels` (N,): of the images whose label is used, else -1; `owners` (K,): the class of each cluster, -1: unsure."""

    Settings = StochasticQuantizationSettings
    title = "triplet encoder and stochastic quantization (Kozyriev and Norkin 2024)"
    settings: StochasticQuantizationSettings
    is_supervised = True
    kept: ClassVar[tuple[str, ...]] = ("spread",)

    def __init__(self, settings: StochasticQuantizationSettings, learner: Learner, batch_size: int) -> None:
        super().__init__(settings, learner, batch_size)
        self.labels = torch.full((len(learner),), -1, device=learner.device)
        self.classes: tuple[str, ...] = ()
        self.owners: list[int] | None = None
        self.spread = torch.tensor(0.0, device=learner.device)
        self._counts = torch.zeros(3, dtype=torch.int64)
        if settings.triplet != "none":
            self.need_trainable()
            self.epochs = settings.triplet.epochs
            self.labels, self.classes = self._used_labels(settings.triplet.labelled_share)

    def _used_labels(self, share: float) -> tuple[Tensor, tuple[str, ...]]:
        """Labels (N,) of `share` of the labelled images, drawn by the seed; at least two of every class that has two."""
        given = self.learner.need_classes(
            "method.name is stochastic_quantization with method.triplet", "or set method.triplet: none"
        )
        known = torch.unique(given.labels[given.labels >= 0])
        if self.settings.init == "classes" and self.settings.n_clusters != len(known):
            raise DataError(
                f"method.init is classes, but method.n_clusters is {self.settings.n_clusters} and the training images have "
                f"{len(known)} classes, expected as many; or set method.init: ++"
            )
        generator = torch.Generator().manual_seed(self.learner.seed)
        labels = torch.full_like(given.labels, -1)
        for label in known:
            members = torch.nonzero(given.labels == label)[:, 0]
            count = max(min(2, len(members)), round(share * len(members)))
            chosen = members[torch.randperm(len(members), generator=generator)[:count]]
            labels[chosen] = label
        return labels.to(self.learner.device), given.classes

    def stages(self) -> list[Stage]:
        return super().stages() if self.settings.triplet != "none" else []

    @torch.no_grad()
    def init_centroids(self) -> None:
        """Without a triplet stage the embeddings are final, and the centroids follow at once."""
        if self.settings.triplet == "none":
            self._quantize()

    @torch.no_grad()
    def begin(self) -> None:
        self.spread = self._all_embeddings().var(0, unbiased=False).sum()

    def order(self, generator: torch.Generator) -> Tensor:
        options = self.settings.triplet
        classes = options.classes_per_batch if options != "none" else 0
        images = max(2, self.batch_size // classes)
        return classes_by_images(self.labels, classes, images, self.steps_per_epoch, generator)

    def loss(self, index: Tensor) -> Tensor:
        """The triplet loss of a batch of labelled images: in cluster space where the projection learns, else on the features it will be fitted to."""
        options = self.settings.triplet
        z = self.learner.latents(index) if self._projects else self.learner.features(index)
        found = triplet_loss(z, self.labels[index], options.margin if options != "none" else 0.0)
        self._counts += torch.tensor([found.pairs, found.active, found.fallbacks])
        return found.loss

    def after_epoch(self, epoch: int) -> EpochReport:
        pairs, active, fallbacks = (float(n) for n in self._counts)
        self._counts.zero_()
        spread = float(self._all_embeddings().var(0, unbiased=False).sum())
        if not spread >= MIN_SPREAD_SHARE * float(self.spread):
            raise CollapseError(
                "guard spread",
                f"the embeddings' variance fell to {spread:.3g}, from {float(self.spread):.3g} at the start; the triplet loss has pulled all "
                f"images to one point: lower the learning rate or method.triplet.margin",
            )
        return EpochReport({"active": active / max(1, pairs), "fallbacks": fallbacks / max(1, pairs), "spread": spread})

    @torch.no_grad()
    def end(self) -> None:
        model = self.learner.model
        if not self._projects:
            model.projection.fit(self.learner.all_features(), self.settings.n_clusters, self.learner.seed)
        self._quantize()

    @property
    def _projects(self) -> bool:
        """Whether the projection learns with the encoder."""
        return self.learner.model.projection.settings.learn

    def _all_embeddings(self) -> Tensor:
        """What the triplet loss moves, (N, D) of all images."""
        return self.learner.all_latents() if self._projects else self.learner.all_features()

    def _quantize(self) -> None:
        options, seed = self.settings, self.learner.seed
        z = self.learner.all_latents()
        how = QuantizationOptions(
            r=options.r,
            optimizer=options.quantizer,
            rho0=options.rho0,
            decay=options.decay,
            init="random" if options.init == "random" else "++",
            reseed=options.init != "classes",  # a centroid that restarts elsewhere would leave its class behind
        )
        quantizer = StochasticQuantizer(options.n_clusters, seed, how, self._class_samples(z))

        # One sample after the other: of several processes, the first one does it.
        mu = ranks.current().same(lambda: quantizer.fit(z, options.passes).centroids)
        self.learner.model.centroids.copy_(mu)
        if self.classes:
            self.owners = self._majorities(nearest(z, self.learner.model.centroids)[0])

    def _class_samples(self, z: Tensor) -> Tensor | None:
        """The embedding (K, D) of one labelled image of each class, drawn by the seed; None unless `init: classes`."""
        if self.settings.init != "classes":
            return None
        generator = torch.Generator().manual_seed(self.learner.seed)
        drawn = []
        for label in torch.unique(self.labels[self.labels >= 0]):
            members = torch.nonzero(self.labels == label)[:, 0]
            drawn.append(members[torch.randint(len(members), (1,), generator=generator)])
        return z[torch.cat(drawn)]

    def _majorities(self, ids: Tensor) -> list[int]:
        """The class of each cluster by its labelled members; ids (N,)."""
        used = self.labels >= 0
        size = max(self.settings.n_clusters, len(self.classes))
        counts = torch.bincount(ids[used] * size + self.labels[used], minlength=size**2).reshape(size, size).cpu()
        best, label = counts.max(1)
        sure = (best > 0) & (best >= self.settings.min_purity * counts.sum(1))
        return torch.where(sure, label, -1)[: self.settings.n_clusters].tolist()

    def cluster_names(self) -> list[str] | None:
        return None if self.owners is None else class_names(self.owners, self.classes)

    def warnings(self) -> list[str]:
        unsure = [] if self.owners is None else [k for k, owner in enumerate(self.owners) if owner < 0]
        if not unsure:
            return []
        return [
            f"{len(unsure)} of {self.settings.n_clusters} clusters have no class that {self.settings.min_purity:.0%} of their labelled images share "
            f"(method.min_purity): {unsure[:10]}; look at them in the report before giving them a verdict"
        ]
