"""What every clustering method is to the training loop: initial centroids, stages that move them, and a state to resume from."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from configs import Settings
from trainer.clustering.kmeans import KMeansOptions, kmeans
from trainer.learner import Learner
from trainer.stage import Stage


class MethodSettings(Settings):
    """What all methods share. `name` is the key in METHODS."""

    name: str
    n_clusters: int = Field(ge=1, description="the number of clusters, an integer >= 1")
    n_init: int = Field(20, ge=1, description="k-means restarts")


class Method:
    """A method on one learner. `title` is what `dkm-train methods` prints; `needs_decoder`: the reconstruction stays in the loss.

    `is_supervised`: it learns from class folders, and only then are they in `learner.supervision`. `finds_clusters`: `n_clusters` is
    a limit, and may be more than there are images.
    """

    Settings: ClassVar[type[MethodSettings]]
    title: ClassVar[str]
    needs_decoder: ClassVar[bool] = False
    is_supervised: ClassVar[bool] = False
    finds_clusters: ClassVar[bool] = False

    def __init__(self, settings: MethodSettings, learner: Learner, batch_size: int) -> None:
        self.settings, self.learner, self.batch_size = settings, learner, batch_size
        if self.needs_decoder:
            learner.need_decoder(f"method.name {settings.name}")

    def stages(self) -> list[Stage]:
        """The clustering stages, after pre-training and `init_centroids`; none for a control."""
        return []

    @torch.no_grad()
    def init_centroids(self) -> None:
        """Centroids by k-means on the embeddings of all training samples."""
        result = kmeans(
            self.learner.all_latents(),
            self.settings.n_clusters,
            self.learner.seed,
            KMeansOptions(n_init=self.settings.n_init),
        )
        self.learner.model.centroids.copy_(result.centroids)

    @property
    def looks(self) -> int:
        """How often the guards have looked at the clusters and let them pass; 0 where they never do."""
        return 0

    def figures(self) -> dict[str, float]:
        """What the run's metrics say of this method beside the common ones, once it has finished."""
        return {}

    def warnings(self) -> list[str]:
        """What an engineer must know before using this run; empty where there is nothing."""
        return []

    def refusal(self) -> str | None:
        """Why this run must not be exported, once it has finished; None where it may."""
        return None

    def review(self) -> list[tuple[int, str]]:
        """Training samples that an engineer should look at, by index, with the reason; empty where there are none."""
        return []

    def cluster_names(self) -> list[str] | None:
        """A name for each cluster, where the method knows what it is; None: numbered."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Tensors to keep in a checkpoint beside the model's; `load_state` takes them back."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` gave."""
