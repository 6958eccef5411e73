"""Deep Embedded Clustering: encoder and centroids refined together by self-training; `method.name: dec`.

Source: Xie, Girshick, Farhadi, "Unsupervised Deep Embedding for Clustering Analysis", 2016, arXiv 1511.06335, eq. 1 to 3.
    q_ij ~ (1 + d_ij / t_dof)^(-(t_dof + 1) / 2)        p_ij ~ q_ij^2 / sum_i q_ij        L = KL(P || Q) / B
P is of the whole data set and constant between refreshes. Differs from the paper: convergence is measured over at least one
epoch, twice in a row (a short refresh interval moves few labels by itself); momentum is kept across refreshes; distances may be
divided by a fixed `length_scale`, since the kernel's own scale is 1 and normalised features lie closer than that.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.assignment import log_student_t, target_distribution
from trainer.distance import nearest, squared_distances
from trainer.guards import ClusterGuard
from trainer.learner import Learner
from trainer.methods.base import Method, MethodSettings
from trainer.stage import EpochReport, OptimizerSettings, Stage


class DECSettings(MethodSettings):
    """`t_dof` is the paper's alpha, `refresh_steps` its T (None: half an epoch).

    `length_scale: auto` is the root mean squared distance to the own centroid at the start.
    """

    name: Literal["dec"] = "dec"
    epochs: int = Field(100, ge=1)
    t_dof: float = Field(1.0, gt=0)
    length_scale: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    refresh_steps: int | None = Field(None, ge=1)
    tol: float = Field(0.001, ge=0, lt=1)
    optimizer: OptimizerSettings = OptimizerSettings(kind="sgd", lr=0.01)


class DEC(Method):
    """KL self-training of whatever is trainable: encoder, projection (with `projection.learn`), centroids."""

    Settings = DECSettings
    title = "Deep Embedded Clustering (Xie et al. 2016)"
    settings: DECSettings

    def __init__(self, settings: DECSettings, learner: Learner, batch_size: int) -> None:
        super().__init__(settings, learner, batch_size)
        n, k = len(learner), settings.n_clusters
        self.steps_per_epoch = -(-n // batch_size)
        self.refresh_steps = settings.refresh_steps or max(1, self.steps_per_epoch // 2)
        self._state = {
            "p": torch.full((n, k), 1.0 / k),
            "reference": torch.zeros(n, dtype=torch.int64),
            "reference_step": torch.tensor(-1),
            "quiet": torch.tensor(0),
            "churn": torch.tensor(1.0),
            "length_scale": torch.tensor(1.0),
            "spread": torch.tensor(0.0),
            "empty_refreshes": torch.tensor(0),
        }
        self._figures: dict[str, float] = {}

    def stages(self) -> list[Stage]:
        model = self.learner.model
        parameters = [p for p in model.parameters() if p.requires_grad]
        return [
            Stage(
                "dec",
                self.settings.epochs,
                self.batch_size,
                self.settings.optimizer,
                parameters,
                self.loss,
                [model.encoder] if model.encoder.is_trainable else [],
                self.begin,
                self.before_step,
                self.after_epoch,
            )
        ]

    @torch.no_grad()
    def begin(self) -> None:
        """Fixes the length scale and the starting spread."""
        z = self.learner.all_latents()
        if self.settings.length_scale == "auto":
            self._state["length_scale"] = (
                nearest(z, self.learner.model.centroids)[1].mean().sqrt().clamp_min(1e-6).cpu()
            )
        else:
            self._state["length_scale"] = torch.tensor(float(self.settings.length_scale))
        self._state["spread"] = z.var(0, unbiased=False).sum().cpu()

    def log_q(self, z: Tensor) -> Tensor:
        """Log q (B, K) of latents z (B, D)."""
        scale = self._state["length_scale"].to(z.device)
        return log_student_t(squared_distances(z / scale, self.learner.model.centroids / scale), self.settings.t_dof)

    def loss(self, index: Tensor) -> Tensor:
        """KL(P || Q), summed over clusters, averaged over the batch."""
        p = self._state["p"][index]
        return torch.nn.functional.kl_div(self.log_q(self.learner.latents(index)), p, reduction="batchmean")

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Every `refresh_steps`: new q, p and labels from a full pass; guards and churn."""
        if step % self.refresh_steps:
            return
        z = self.learner.all_latents()
        q = torch.cat([self.log_q(part).exp() for part in z.split(8192)])
        self._state["p"] = target_distribution(q)
        guard = ClusterGuard(
            self.settings.n_clusters, float(self._state["spread"]), int(self._state["empty_refreshes"])
        )
        self._figures = guard.figures(q, z, self.learner.model.centroids)
        self._state["empty_refreshes"] = torch.tensor(guard.empty_refreshes)
        self._measure_churn(q.argmax(1), step)

    def _measure_churn(self, labels: Tensor, step: int) -> None:
        reference_step = int(self._state["reference_step"])
        if reference_step >= 0 and step - reference_step < self.steps_per_epoch:
            return
        if reference_step >= 0:
            churn = (labels != self._state["reference"].to(labels.device)).float().mean().cpu()
            quiet = int(self._state["quiet"]) + 1 if float(churn) < self.settings.tol else 0
            self._state |= {"churn": churn, "quiet": torch.tensor(quiet)}
        self._state |= {"reference": labels, "reference_step": torch.tensor(step)}

    def after_epoch(self, epoch: int) -> EpochReport:
        return EpochReport({**self._figures, "churn": float(self._state["churn"])}, stop=int(self._state["quiet"]) >= 2)

    def state(self) -> dict[str, Tensor]:
        return dict(self._state)

    def load_state(self, state: dict[str, Tensor]) -> None:
        device = self.learner.device
        self._state = {
            name: tensor.to(device) if name in {"p", "reference"} else tensor for name, tensor in state.items()
        }
