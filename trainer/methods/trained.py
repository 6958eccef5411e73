"""What the methods that train have in common: one stage over the encoder, watched until its assignments rest, and a state to resume from."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.convergence import Convergence
from trainer.learner import Learner
from trainer.methods.base import Method, MethodSettings
from trainer.stage import EpochReport, OptimizerSettings, Stage


class SeveralClustersSettings(MethodSettings):
    """Of methods that say nothing about a single cluster: one kind of part is for ae_kmeans."""

    n_clusters: int = Field(ge=2, description="the number of clusters, an integer >= 2 (one kind of part: ae_kmeans)")


class TrainedSettings(SeveralClustersSettings):
    """`optimizer` of the method's own stage."""

    optimizer: OptimizerSettings = OptimizerSettings()


class TrainedMethod(Method):
    """A method of one stage, named as itself; subclasses set `epochs` and `convergence`, give `loss`, and add hooks where they need them.

    `learns_centroids`: they follow the gradient too. `kept`: the attributes, tensors all, that a checkpoint keeps.
    """

    learns_centroids: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    settings: TrainedSettings
    epochs: int
    convergence: Convergence

    def __init__(self, settings: TrainedSettings, learner: Learner, batch_size: int) -> None:
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
            )
        ]

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

    @torch.no_grad()
    def begin(self) -> None:
        """The starting spread, and whatever else is fixed at the start."""
        z = self.learner.all_latents()
        self.convergence.begin(z)
        self.start(z)

    def start(self, z: Tensor) -> None:
        """Fixes what the method needs of the first embeddings z (N, D)."""

    def loss(self, index: Tensor) -> Tensor:
        """What one step lowers, for samples `index` (B,)."""
        raise TypeError(f"{type(self).__name__} has no loss")

    def before_step(self, step: int) -> None:
        """Before step number `step` of the stage."""

    def after_step(self, index: Tensor) -> None:
        """After the step of samples `index` (B,)."""

    def after_epoch(self, epoch: int) -> EpochReport:
        """The log's figures, and whether the assignments have come to rest."""
        return EpochReport(self.convergence.figures, stop=self.convergence.is_reached)

    def end(self) -> None:
        """After the last epoch."""

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.kept} | self.convergence.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name in self.kept:
            setattr(self, name, state[name].to(self.learner.device))
        self.convergence.load_state(state)
