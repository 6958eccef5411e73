"""What the methods that train have in common: one stage over the encoder, with hooks for what each does differently, and a state to resume from."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.errors import DataError
from trainer.learner import Learner
from trainer.methods.base import Method, MethodSettings
from trainer.stage import EpochReport, OptimizerSettings, Stage


class SeveralClustersSettings(MethodSettings):
    """Of methods that say nothing about a single cluster: one kind of part is for ae_kmeans."""

    n_clusters: int = Field(ge=2, description="the number of clusters, an integer >= 2 (one kind of part: ae_kmeans)")


class StagedSettings(SeveralClustersSettings):
    """`optimizer` of the method's own stage."""

    optimizer: OptimizerSettings = OptimizerSettings()


class StagedMethod(Method):
    """A method of one stage, named as itself; subclasses set `epochs`, give `loss`, and add hooks where they need them.

    `learns_centroids`: they follow the gradient too. `kept`: the attributes, tensors all, that a checkpoint keeps.
    """

    learns_centroids: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    settings: StagedSettings
    epochs: int

    def __init__(self, settings: StagedSettings, learner: Learner, batch_size: int) -> None:
        super().__init__(settings, learner, batch_size)
        self.steps_per_epoch = max(1, -(-len(learner) // batch_size))

    def stages(self) -> list[Stage]:
        return [
            Stage(
                self.settings.name,
                self.epochs,
                self.batch_size,
                self.settings.optimizer,
                self.parameters(),
                self.loss,
                self.modules(),
                self.begin,
                self.before_step,
                self.after_step,
                self.after_epoch,
                self.end,
                self.before_epoch,
                self.order,
                self.renewed(),
            )
        ]

    @property
    def moves_embeddings(self) -> bool:
        """Whether anything between image and embedding learns: the encoder, or the projection."""
        model = self.learner.model
        return model.encoder.is_trainable or any(p.requires_grad for p in model.projection.parameters())

    def need_trainable(self, or_projection: bool = False) -> None:
        """Refuses an encoder that is frozen, unless a projection that learns will do as well.

        Raises:
            DataError: so it is.
        """
        model = self.learner.model
        if self.moves_embeddings if or_projection else model.encoder.is_trainable:
            return
        choice = ", or projection.learn: true with projection.kind pca or within" if or_projection else ""
        raise DataError(
            f"method.name is {self.settings.name}, which moves the embeddings, but encoder {model.encoder.settings.name} is frozen; "
            f"expected a trainable encoder{choice}"
        )

    def refuse_learned_projection(self) -> None:
        """Refuses a projection that learns, for methods that fit it to the features at their end.

        Raises:
            DataError: so it is.
        """
        if self.learner.model.projection.settings.learn:
            raise DataError(
                f"projection.learn is true, but method {self.settings.name} trains the encoder and fits the projection to its features; "
                f"leave it out"
            )

    def modules(self) -> list[nn.Module]:
        """What goes into training mode: the encoder where it trains, the decoder where it is kept."""
        model, decoder = self.learner.model, self.learner.decoder
        encoder: list[nn.Module] = [model.encoder] if model.encoder.is_trainable else []
        return [*encoder, decoder] if self.needs_decoder and decoder is not None else encoder

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves: encoder, decoder where it is kept, projection where it learns, centroids where they follow the gradient."""
        model = self.learner.model
        moved = [p for module in (*self.modules(), model.projection) for p in module.parameters() if p.requires_grad]
        return [*moved, model.centroids] if self.learns_centroids else moved

    def renewed(self) -> list[nn.Parameter]:
        """Further parameters, which `before_epoch` starts anew now and then."""
        return []

    def begin(self) -> None:
        """Once, when the stage starts."""

    def loss(self, index: Tensor) -> Tensor:
        """What one step lowers, for samples `index` (B,)."""
        raise TypeError(f"{type(self).__name__} has no loss")

    def before_epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Before the first step of an epoch."""

    def order(self, generator: torch.Generator) -> Tensor:
        """The samples (M,) of an epoch, in order."""
        return torch.randperm(len(self.learner), generator=generator)

    def before_step(self, step: int) -> None:
        """Before step number `step` of the stage."""

    def after_step(self, index: Tensor) -> None:
        """After the step of samples `index` (B,)."""

    def after_epoch(self, epoch: int) -> EpochReport:
        """The log's figures, and whether to stop."""
        return EpochReport()

    def end(self) -> None:
        """After the last epoch."""

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.kept}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name in self.kept:
            setattr(self, name, state[name].to(self.learner.device))
