"""What the scripts here share: `fit` on MNIST or made-up images, its epochs timed as its own log does it."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer import FitOptions, fit
from trainer.progress import Silent
from trainer.settings import TrainSettings

MLP = {"name": "mlp", "hidden": [500, 500, 2000], "dim": 10}


class EpochTimes(Silent):
    """Seconds of every epoch, by stage; `between` runs after each and is not in them."""

    def __init__(self, between: Callable[[], None] | None = None) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._between, self._stage = between, ""

    def stage(self, name: str, epochs: int, first: int) -> None:
        self._stage = name

    def epoch(self, epoch: int, figures: dict[str, float]) -> None:
        self.seconds.setdefault(self._stage, []).append(figures["seconds"])
        if self._between is not None:
            self._between()

    def best(self, stage: str) -> float:
        """The quickest epoch after the first, which warms caches; of one epoch, that one."""
        found = self.seconds[stage]
        return min(found[1:] or found)

    def usual(self, stage: str) -> float:
        """The median of those."""
        found = self.seconds[stage]
        return statistics.median(found[1:] or found)


def pretrain(
    pixels: NDArray[np.uint8], epochs: int, times: EpochTimes, encoder: dict[str, object] = MLP, **train: object
) -> None:
    """Reconstruction of pixels (N, h, w, 1 or 3) for some epochs, by `fit`; `train` as in the settings."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "images.npz", X=pixels)
        settings = TrainSettings.model_validate(
            {
                "data": {"path": str(folder / "images.npz")},
                "preprocess": {
                    "resize": "none",
                    "color": "gray" if pixels.shape[-1] == 1 else "bgr",
                    "normalise": "unit",
                },
                "encoder": encoder,
                "pretrain": {"epochs": epochs},
                "method": {"name": "ae_kmeans", "n_clusters": 2, "n_init": 1},
                "train": {"checkpoint_every_s": 1e6, **train},
                "novelty": "none",
            }
        )
        fit(settings, FitOptions(folder / "run", progress=times))


def images(archive: Path, n: int | None = None) -> NDArray[np.uint8]:
    """The first `n` images of an archive, (N, h, w, 1 or 3)."""
    pixels = np.load(archive)["X"][:n]
    return pixels if pixels.ndim == 4 else pixels[..., None]
