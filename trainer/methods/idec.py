"""Improved DEC: DEC with the decoder kept, so that clustering cannot destroy local structure; `method.name: idec`.

Source: Guo, Gao, Liu, Yin, "Improved Deep Embedded Clustering with Local Structure Preservation", IJCAI 2017.
    L = |x - g(f(x))|^2 / d + gamma KL(P || Q)
`gamma` multiplies the clustering term, and belongs to a reconstruction error averaged over elements, as in the authors' code (of a
summed one it would be d times larger). Differs from the paper: as `dec` does.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from trainer.methods.dec import DEC, SelfTrainingSettings
from trainer.stage import OptimizerSettings


class IDECSettings(SelfTrainingSettings):
    """`gamma`: weight of the clustering term; too large behaves as dec, too small as ae_kmeans."""

    name: Literal["idec"] = "idec"
    gamma: float = Field(0.1, gt=0)
    optimizer: OptimizerSettings = OptimizerSettings(kind="adam", lr=1e-3)


class IDEC(DEC):
    """KL self-training beside reconstruction."""

    Settings = IDECSettings
    title = "Improved DEC, reconstruction kept (Guo et al. 2017)"
    settings: IDECSettings
    needs_decoder = True

    def loss(self, index: Tensor) -> Tensor:
        """Mean squared error per element, and gamma KL(P || Q)."""
        z, error = self.reconstruct(index)
        return error.mean() / self.learner.elements + self.settings.gamma * self.divergence(z, index)
