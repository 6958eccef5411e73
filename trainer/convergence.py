"""Watches a clustering stage from refresh to refresh: the guards, how many assignments still move, when they have come to rest."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from trainer.distance import nearest
from trainer.guards import ClusterGuard, effective_number
from trainer.stage import figures_of, figures_state


class Convergence:
    """Churn is measured over at least `interval_steps` (an epoch, as a rule), twice in a row below `tol`: few steps move few labels anyway.

    `state` and `load_state` are what a checkpoint keeps; `figures` is the log's; `looks` counts those that the guards let pass, and the
    start, which they measure by.
    """

    KEYS: ClassVar = ("reference", "reference_step", "quiet", "churn", "spread", "n_eff", "empty_refreshes", "looks")

    def __init__(self, n: int, n_clusters: int, tol: float, interval_steps: int) -> None:
        self.n_clusters, self.tol, self.interval_steps = n_clusters, tol, interval_steps
        self.reference = torch.zeros(n, dtype=torch.int64)
        self.reference_step, self.quiet, self.churn = -1, 0, 1.0
        self.spread, self.n_eff, self.empty_refreshes, self.looks = 0.0, float(n_clusters), 0, 0
        self._figures: dict[str, float] = {}

    def begin(self, z: Tensor, mu: Tensor | None = None) -> None:
        """Notes what the guards compare with: the spread of the embeddings z (N, D), and how evenly centroids mu (K, D) found in them share them."""
        self.looks += 1
        self.spread = float(z.var(0, unbiased=False).sum())
        if mu is not None:
            self.n_eff = float(effective_number(self._one_hot(nearest(z, mu)[0], z)))

    def check(self, z: Tensor) -> None:
        """Whether embeddings z (N, D) can be clustered at all; before k-means, which would blame the images.

        Raises:
            CollapseError: naming the guard.
        """
        self._guard().check_embeddings(z)

    def look(self, q: Tensor, z: Tensor, mu: Tensor, step: int) -> None:
        """Takes one refresh: q (N, K) soft, or labels (N,); z (N, D); mu (K, D).

        Raises:
            CollapseError: naming the guard.
        """
        soft = q if q.ndim == 2 else self._one_hot(q, z)
        guard = self._guard()
        self._figures = guard.figures(soft, z, mu)
        self.empty_refreshes = guard.empty_refreshes
        self.looks += 1
        self._measure_churn(soft.argmax(1), step)

    def _guard(self) -> ClusterGuard:
        return ClusterGuard(self.n_clusters, self.spread, self.n_eff, self.empty_refreshes)

    def _one_hot(self, labels: Tensor, z: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(labels, self.n_clusters).to(z.dtype)

    def _measure_churn(self, labels: Tensor, step: int) -> None:
        if self.reference_step >= 0:
            if step - self.reference_step < self.interval_steps:
                return
            self.churn = float((labels != self.reference.to(labels.device)).float().mean())
            self.quiet = self.quiet + 1 if self.churn < self.tol else 0
        self.reference, self.reference_step = labels, step

    @property
    def is_reached(self) -> bool:
        """Whether the assignments have come to rest."""
        return self.quiet >= 2

    @property
    def figures(self) -> dict[str, float]:
        """n_eff, smallest cluster, spread, distance of the closest centroids, churn."""
        return {**self._figures, "churn": self.churn}

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors."""
        return figures_state(self._figures) | {
            f"convergence.{key}": torch.as_tensor(getattr(self, key)) for key in self.KEYS
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        self.reference = state["convergence.reference"]
        self._figures = figures_of(state)
        for key in self.KEYS[1:]:
            setattr(self, key, state[f"convergence.{key}"].item())
