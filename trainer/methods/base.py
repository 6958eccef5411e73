"""What every clustering method is to the training loop: initial centroids, stages that move them, and a state to resume from."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from configs import Settings
from trainer.clustering.kmeans import KMeansOptions, kmeans
from trainer.learner import Learner
from trainer.stage import Stage


class MethodSettings(Settings):
    """What all methods share. `name` is the key in METHODS."""

    name: str
    n_clusters: int = Field(ge=1, description="the number of clusters, an integer >= 1")
    n_init: int = Field(20, ge=1, description="k-means restarts")


class LearnedSettings(MethodSettings):
    """Of methods whose loss says nothing about a single cluster: one kind of part is for ae_kmeans."""

    n_clusters: int = Field(ge=2, description="the number of clusters, an integer >= 2 (one kind of part: ae_kmeans)")


class Method:
    """A method on one learner. `title` is what `dkm-train methods` prints; `needs_decoder`: the reconstruction stays in the loss."""

    Settings: ClassVar[type[MethodSettings]]
    title: ClassVar[str]
    needs_decoder: ClassVar[bool] = False

    def __init__(self, settings: MethodSettings, learner: Learner, batch_size: int) -> None:
        self.settings, self.learner, self.batch_size = settings, learner, batch_size
        self.steps_per_epoch = max(1, -(-len(learner) // batch_size))
        if self.needs_decoder:
            learner.need_decoder(f"method.name {settings.name}")

    def encoder_parameters(self) -> list[nn.Parameter]:
        """What trains besides the centroids: encoder, projection where it learns, the decoder where it is kept."""
        model, decoder = self.learner.model, self.learner.decoder
        modules = [model.encoder, model.projection, *([decoder] if self.needs_decoder and decoder is not None else [])]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def encoder_modules(self) -> list[nn.Module]:
        """What goes into training mode with them."""
        model, decoder = self.learner.model, self.learner.decoder
        encoder: list[nn.Module] = [model.encoder] if model.encoder.is_trainable else []
        return [*encoder, decoder] if self.needs_decoder and decoder is not None else encoder

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

    def figures(self) -> dict[str, float]:
        """What the run's metrics say of this method beside the common ones, once it has finished."""
        return {}

    def warnings(self) -> list[str]:
        """What an engineer must know before using this run; empty where there is nothing."""
        return []

    def state(self) -> dict[str, Tensor]:
        """Tensors to keep in a checkpoint beside the model's; `load_state` takes them back."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` gave."""
