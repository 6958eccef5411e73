"""What the methods that move the embeddings towards centroids have in common: they are watched until their assignments rest."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.convergence import Convergence
from trainer.methods.staged import StagedMethod
from trainer.stage import EpochReport


class TrainedMethod(StagedMethod):
    """A staged method that ends when its assignments have come to rest; subclasses set `convergence`."""

    convergence: Convergence

    @torch.no_grad()
    def begin(self) -> None:
        """The starting spread, and whatever else is fixed at the start."""
        z = self.learner.all_latents()
        self.convergence.begin(z)
        self.start(z)

    def start(self, z: Tensor) -> None:
        """Fixes what the method needs of the first embeddings z (N, D)."""

    def after_epoch(self, epoch: int) -> EpochReport:
        """The log's figures, and whether the assignments have come to rest."""
        return EpochReport(self.convergence.figures, stop=self.convergence.is_reached)

    def state(self) -> dict[str, Tensor]:
        return super().state() | self.convergence.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.convergence.load_state(state)
